/**
 * What this program keeps in the header of an overlay that it made, as a header extension of its own: that it made it,
 * and what the files alone do not tell. The overlay's name is its file's.
 *
 * The extension has always the same length, and what changes while the overlay is in use is in its first 16 bytes, so
 * that a change is one write inside one sector.
 */
import { bigEndian, u8, u16, u32, u64 } from '../bytes/record.ts';
import { encodeHeaderCluster, type Header, readHeader } from '../qcow2/header.ts';
import { extensionType, type HeaderExtension } from '../qcow2/header-extensions.ts';
import type { Storage } from '../storage/storage.ts';
import { decodeGuest } from './checkpoint-record.ts';
import type { CheckpointDetails, Consistency } from './disk.ts';

export interface OverlayMark {
  /** Of two ends of the chain, the one made later is the live disk. */
  readonly sequence: number;
  /** The checkpoint is not complete: a crash takes it back. */
  readonly pending: boolean;
  /** The end of a branch that the disk has left: never the live disk, whatever its sequence. */
  readonly kept: boolean;
  /** A merge with the layer below has begun: the checkpoint's contents are there no more. */
  readonly merging: boolean;
  /** The merge makes it the bottom of the disk. */
  readonly becomesBottom: boolean;
  /** The bottom of a disk, made from an overlay by a merge: no overlay any more. */
  readonly bottom: boolean;
  readonly createdMs: number;
  readonly details: CheckpointDetails;
  /** The file name that a merge or a renaming is about to give to this file; empty without. */
  readonly takesName: string;
}

const record = bigEndian('overlay mark', 24, {
  /** 1 */
  version: u16,
  flags: u8,
  consistency: u8,
  sequence: u32,
  reserved: u64,
  createdMs: u64,
});

const VERSION = 1;
const flagBits = { pending: 1, kept: 2, merging: 4, bottom: 8, becomesBottom: 16 } as const;
/** The text of the name means something. */
const TAKES_NAME = 32;
const CONSISTENCIES: readonly Consistency[] = ['crash', 'frozen', 'memory'];

/** Two texts follow the record, each in UTF-8 and padded with zeros: the name to take, and the guest as JSON. */
const NAME_BYTES = 256;
/** The smallest cluster of an overlay, 4 KiB, must have room for it, and for two names of backing files. */
const GUEST_BYTES = 1536;
const MARK_BYTES = record.bytes + NAME_BYTES + GUEST_BYTES;

const text = (bytes: Uint8Array): string => {
  const end = bytes.indexOf(0);
  return new TextDecoder().decode(end < 0 ? bytes : bytes.subarray(0, end));
};

export function encodeMark(mark: OverlayMark): HeaderExtension {
  const data = new Uint8Array(MARK_BYTES);
  const flags = Object.entries(flagBits).reduce(
    (sum, [name, bit]) => sum | (mark[name as keyof typeof flagBits] ? bit : 0),
    mark.takesName === '' ? 0 : TAKES_NAME,
  );
  record.encode(
    {
      version: VERSION,
      flags,
      consistency: CONSISTENCIES.indexOf(mark.details.consistency),
      sequence: mark.sequence,
      createdMs: BigInt(Math.floor(mark.createdMs)),
    },
    data,
  );
  const encoder = new TextEncoder();
  encoder.encodeInto(mark.takesName, data.subarray(record.bytes, record.bytes + NAME_BYTES - 1));
  const { guest } = mark.details;
  // A long command line is left out: whose memory it is must be known, how it was started may be asked for elsewhere.
  const forms = guest === undefined ? [] : [{ guest }, { guest: { ...guest, argv: [] } }];
  const fitting = forms.map((form) => encoder.encode(JSON.stringify(form))).find(({ length }) => length < GUEST_BYTES);
  if (fitting !== undefined) data.set(fitting, record.bytes + NAME_BYTES);
  return { type: extensionType.OVERLAY, data };
}

/** Undefined for an overlay that this program did not make, or a later version of it. */
export function markOf(header: Header): OverlayMark | undefined {
  const data = header.extensions.find(({ type }) => type === extensionType.OVERLAY)?.data;
  if (data === undefined || data.length !== MARK_BYTES) return undefined;
  const { version, flags, consistency, sequence, createdMs } = record.decode(data);
  if (version !== VERSION || (flags & flagBits.bottom) !== 0) return undefined;
  const is = (bit: number): boolean => (flags & bit) !== 0;
  const guest = decodeGuest(text(data.subarray(record.bytes + NAME_BYTES)));
  return {
    sequence,
    pending: is(flagBits.pending),
    kept: is(flagBits.kept),
    merging: is(flagBits.merging),
    bottom: is(flagBits.bottom),
    becomesBottom: is(flagBits.becomesBottom),
    createdMs: Number(createdMs),
    details: { consistency: CONSISTENCIES[consistency] ?? 'crash', ...(guest === undefined ? {} : { guest }) },
    takesName: is(TAKES_NAME) ? text(data.subarray(record.bytes, record.bytes + NAME_BYTES)) : '',
  };
}

/** Change the mark of an overlay where it stands. Durable when it returns. */
export function writeMark(storage: Storage, mark: OverlayMark): void {
  const header = readHeader(storage);
  const old = header.extensions.find(({ type }) => type === extensionType.OVERLAY)?.data;
  const { data } = encodeMark(mark);
  if (old?.length !== data.length) throw new Error(`${storage.path} is no overlay of this program`);
  // A name that is taken, or that nobody wants any more, stays where it is: the flags alone say whether it counts.
  if (mark.takesName === '') data.set(old.subarray(record.bytes, record.bytes + NAME_BYTES), record.bytes);
  const at = positionOf(header);
  // The texts first: they mean nothing before the flags say so.
  if (!Buffer.from(old.subarray(record.bytes)).equals(data.subarray(record.bytes))) {
    storage.write(data, record.bytes, data.length - record.bytes, at + record.bytes);
    storage.flush();
  }
  storage.write(data, 0, record.bytes, at);
  storage.flush();
}

/** Where the mark's data begins in the file. */
function positionOf(header: Header): number {
  let at = header.headerLength;
  for (const { type, data } of header.extensions) {
    if (type === extensionType.OVERLAY) return at + 8;
    at += 8 + Math.ceil(data.length / 8) * 8;
  }
  throw new Error('the mark was there a moment ago');
}

/** Overlays over an image that lie in other folders: where a search beside the image does not find them. */
export function overlaysElsewhere(header: Header): readonly string[] {
  const data = header.extensions.find(({ type }) => type === extensionType.OVERLAYS_ELSEWHERE)?.data;
  return data === undefined ? [] : new TextDecoder().decode(data).split('\0').filter(Boolean);
}

/**
 * Make an image remember the overlays over it that lie in other folders. Durable when it returns.
 * @throws FsError EINVAL where the first cluster has no room for the paths
 */
export function rememberOverlays(storage: Storage, paths: readonly string[]): void {
  const header = readHeader(storage);
  const others = header.extensions.filter(({ type }) => type !== extensionType.OVERLAYS_ELSEWHERE);
  if (paths.length === 0 && others.length === header.extensions.length) return;
  const data = new TextEncoder().encode(paths.join('\0'));
  const extensions = paths.length === 0 ? others : [...others, { type: extensionType.OVERLAYS_ELSEWHERE, data }];
  const cluster = encodeHeaderCluster(header, { extensions });
  storage.write(cluster, 0, cluster.length, 0);
  storage.flush();
}
