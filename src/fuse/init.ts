/** INIT: what the two sides agree on. The only place that knows the protocol's versions and feature flags. */

import { FsError } from '../errors.ts';
import { initIn, initInExt, initOut } from './structures.ts';

/** Kernels whose /dev/fuse is spoken to. */
export type System = 'linux' | 'freebsd';

/** Largest data of one WRITE, and of one READ by the mount option max_read. */
export const REQUEST_BYTES = 1024 * 1024;

const MAJOR = 7;
/** Older kernels have shorter structures (Linux before 3.15, 2014). */
const MINOR_MIN = 23;
/** Newer structures bring nothing that is used here; new flags work without a newer minor. */
const MINOR_MAX = 31;

/** Feature bits of `flags`. */
export const initFlag = {
  ASYNC_READ: 2 ** 0, // several read-ahead READs at once
  BIG_WRITES: 2 ** 5,
  DO_READDIRPLUS: 2 ** 13,
  READDIRPLUS_AUTO: 2 ** 14,
  ASYNC_DIO: 2 ** 15, // libaio and io_uring in parallel
  PARALLEL_DIROPS: 2 ** 18,
  MAX_PAGES: 2 ** 22,
  HANDLE_KILLPRIV_V2: 2 ** 28, // no GETXATTR before each cached write
  INIT_EXT: 2 ** 30, // `flags2` counts
} as const;

/** Feature bits of `flags2`: bit n here is flag 32 + n. */
export const initFlag2 = { DIRECT_IO_ALLOW_MMAP: 2 ** 4 } as const;

const wanted = Object.values(initFlag).reduce((sum, bit) => sum | bit, 0);
const wanted2 = Object.values(initFlag2).reduce((sum, bit) => sum | bit, 0);

/** Requests that the kernel may have open in the background, and where it begins to throttle (defaults: 12, 9). */
const MAX_BACKGROUND = 64;
const CONGESTION_THRESHOLD = 48;

/** REQUEST_BYTES in pages of 4 KiB. Where pages are larger, max_write and max_read still hold. */
const MAX_PAGES = 256;

/** What the kernel offers. */
export interface InitOffer {
  readonly major: number;
  readonly minor: number;
  /** Bytes. */
  readonly maxReadahead: number;
  readonly flags: number;
  readonly flags2: number;
}

/** `body`: the request after its header; 16 bytes before protocol 7.36, 64 since. */
export function decodeInit(body: Uint8Array): InitOffer {
  const offer = initIn.decode(body);
  const extended = (offer.flags & initFlag.INIT_EXT) !== 0 && body.length >= initIn.bytes + initInExt.bytes;
  return { ...offer, flags2: extended ? initInExt.decode(body, initIn.bytes).flags2 : 0 };
}

export interface InitAnswer {
  readonly body: Uint8Array;
  /** False: the kernel speaks a later major version and will ask again with ours. */
  readonly agreed: boolean;
}

/**
 * The reply's body: 64 bytes on both systems (FreeBSD drops the connection at other lengths).
 * @throws FsError ENOTSUP for a kernel that is too old
 */
export function answerInit(offer: InitOffer, system: System): InitAnswer {
  if (offer.major > MAJOR) return { body: initOut.encode({ major: MAJOR, minor: MINOR_MAX }), agreed: false };
  if (offer.major < MAJOR || offer.minor < MINOR_MIN) {
    throw new FsError(
      'ENOTSUP',
      `this kernel speaks FUSE ${offer.major}.${offer.minor}; ${MAJOR}.${MINOR_MIN} or later is needed: use a newer kernel`,
    );
  }
  const flags = (offer.flags & wanted) >>> 0;
  const flags2 = flags & initFlag.INIT_EXT ? (offer.flags2 & wanted2) >>> 0 : 0;
  const linux = system === 'linux';
  const body = initOut.encode({
    major: MAJOR,
    minor: Math.min(offer.minor, MINOR_MAX),
    maxReadahead: offer.maxReadahead,
    flags,
    flags2,
    maxWrite: REQUEST_BYTES,
    timeGran: 1,
    // FreeBSD ignores these three.
    maxBackground: linux ? MAX_BACKGROUND : 0,
    congestionThreshold: linux ? CONGESTION_THRESHOLD : 0,
    maxPages: flags & initFlag.MAX_PAGES ? MAX_PAGES : 0,
  });
  return { body, agreed: true };
}
