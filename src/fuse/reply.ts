/** Reply bodies: what follows the fuse_out_header. Sizes are exact, the kernel refuses anything else. */

import type { Attributes, FileSystemStatus } from './filesystem.ts';
import { NAME_BYTES_MAX } from './request.ts';
import * as s from './structures.ts';

export const NOTHING = new Uint8Array(0);
export const ENTRY_BYTES = s.entryOut.bytes + s.attr.bytes;

/** st_blksize of everything: bhyve shows it to the guest as the physical sector size, so it never changes. */
export const BLOCK_SIZE = 4096;
export const STAT_BLOCK_BYTES = 512;

/** Answer flags of OPEN (FOPEN_*). */
export const fopen = { DIRECT_IO: 1 << 0, KEEP_CACHE: 1 << 1, PARALLEL_DIRECT_WRITES: 1 << 6 } as const;

export function openFlags(caching: 'direct' | 'keep' | 'fresh'): number {
  switch (caching) {
    case 'direct':
      return fopen.DIRECT_IO | fopen.PARALLEL_DIRECT_WRITES;
    case 'keep':
      return fopen.KEEP_CACHE;
    case 'fresh':
      return 0;
  }
}

/** Milliseconds as the whole seconds and the nanoseconds of a timespec; also before 1970. */
function timespec(ms: number): { seconds: bigint; nanoseconds: number } {
  const seconds = Math.floor(ms / 1000);
  return {
    seconds: BigInt.asUintN(64, BigInt(seconds)),
    nanoseconds: Math.min(Math.floor((ms - seconds * 1000) * 1e6), 999_999_999),
  };
}

function attrOf(ino: number, attributes: Attributes): Partial<s.Attr> {
  const atime = timespec(attributes.atimeMs);
  const mtime = timespec(attributes.mtimeMs);
  const ctime = timespec(attributes.ctimeMs);
  return {
    ino: BigInt(ino),
    size: BigInt(attributes.size),
    blocks: BigInt(Math.ceil(attributes.allocatedBytes / STAT_BLOCK_BYTES)),
    atime: atime.seconds,
    mtime: mtime.seconds,
    ctime: ctime.seconds,
    atimensec: atime.nanoseconds,
    mtimensec: mtime.nanoseconds,
    ctimensec: ctime.nanoseconds,
    mode: attributes.mode,
    nlink: attributes.nlink,
    uid: attributes.uid,
    gid: attributes.gid,
    blksize: BLOCK_SIZE,
  };
}

/** A node as replies need it: `filesystem.ts` explains the members. */
export interface Described {
  readonly ino: number;
  readonly attributesValidMs: number;
  readonly entryValidMs: number;
}

/** ENTRY: the answer to LOOKUP, MKDIR; also the head of a direntplus. */
export function encodeEntry(node: Described, attributes: Attributes): Uint8Array {
  const body = new Uint8Array(ENTRY_BYTES);
  const entryValid = timespec(node.entryValidMs);
  const attrValid = timespec(node.attributesValidMs);
  s.entryOut.encode(
    {
      nodeid: BigInt(node.ino),
      generation: 0n, // ino numbers are never used twice
      entryValid: entryValid.seconds,
      entryValidNsec: entryValid.nanoseconds,
      attrValid: attrValid.seconds,
      attrValidNsec: attrValid.nanoseconds,
    },
    body,
  );
  return s.attr.encode(attrOf(node.ino, attributes), body, s.entryOut.bytes);
}

/** ATTR_OUT: the answer to GETATTR and SETATTR. */
export function encodeAttr(node: Described, attributes: Attributes): Uint8Array {
  const body = new Uint8Array(s.attrOut.bytes + s.attr.bytes);
  const valid = timespec(node.attributesValidMs);
  s.attrOut.encode({ attrValid: valid.seconds, attrValidNsec: valid.nanoseconds }, body);
  return s.attr.encode(attrOf(node.ino, attributes), body, s.attrOut.bytes);
}

export const encodeOpen = (fh: number, flags: number): Uint8Array =>
  s.openOut.encode({ fh: BigInt(fh), openFlags: flags });

/** The answer to CREATE: ENTRY, then OPEN_OUT. */
export const encodeCreate = (entry: Uint8Array, open: Uint8Array): Uint8Array => Buffer.concat([entry, open]);

export const encodeWrite = (count: number): Uint8Array => s.writeOut.encode({ size: count });
export const encodeLseek = (offset: number): Uint8Array => s.lseekOut.encode({ offset: BigInt(offset) });

export function encodeStatfs(status: FileSystemStatus): Uint8Array {
  const blocks = (bytes: number) => BigInt(Math.floor(bytes / status.blockBytes));
  return s.statfsOut.encode({
    blocks: blocks(status.totalBytes),
    bfree: blocks(status.freeBytes),
    bavail: blocks(status.availableBytes),
    files: BigInt(status.files),
    ffree: 0n,
    bsize: status.blockBytes,
    frsize: status.blockBytes,
    namelen: NAME_BYTES_MAX,
  });
}

/** A whole reply without a body: success, or the negated errno that `error` is. */
export const encodeEmptyReply = (unique: bigint, error: number): Uint8Array =>
  s.outHeader.encode({ len: s.outHeader.bytes, error, unique });

export const encodeReplyHeader = (unique: bigint, bodyBytes: number): Uint8Array =>
  s.outHeader.encode({ len: s.outHeader.bytes + bodyBytes, error: 0, unique });
