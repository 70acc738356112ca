/** Copying what a disk shows to a file of its own: sparse, zeros left out whether or not they are allocated. */
import { Buffer } from 'node:buffer';
import { setImmediate as giveWay } from 'node:timers/promises';
import type { Compressor } from '../qcow2/compressor.ts';
import type { ImageWriter } from '../qcow2/image-writer.ts';
import type { Storage } from '../storage/storage.ts';
import type { Work } from './disk.ts';

/** The bytes to copy: a disk's `Contents`, or a plain file. They must not change meanwhile. */
export interface Source {
  /** Bytes. */
  size(): number;
  /** Fills all of `target[at, at + length)`; the range lies inside `size()`. */
  read(target: Uint8Array, at: number, length: number, offset: number): void;
  /** First offset ≥ `offset` that holds data, or -1. */
  nextData(offset: number): number;
  /** First offset ≥ `offset` in a hole; `size()` if there is none. */
  nextHole(offset: number): number;
}

/** Bytes [from, to) of a disk. */
export interface ByteSpan {
  readonly from: number;
  readonly to: number;
}

/** Read at a time; a multiple of every cluster size. */
const PIECE_BYTES = 2 * 2 ** 20;
const ZEROS = Buffer.alloc(PIECE_BYTES);
/** Zeros in a plain file are left out in whole pages of the host. */
const PAGE_BYTES = 4096;

const isZero = (bytes: Uint8Array, at: number, length: number): boolean =>
  ZEROS.compare(bytes, at, at + length, 0, length) === 0;

/** A plain disk. `target` is an empty file. @throws FsError ENOSPC, EIO, what the source throws, the signal's reason */
export async function copyToRaw(source: Source, target: Storage, work: Work): Promise<void> {
  target.truncate(source.size());
  const visit = async (bytes: Uint8Array, length: number, offset: number): Promise<void> => {
    eachRun(bytes, length, PAGE_BYTES, (at, run, zero) => {
      if (!zero) target.write(bytes, at, run, offset + at);
    });
  };
  await eachPiece(source, { from: 0, to: source.size() }, PAGE_BYTES, work, { data: visit, hole: () => {} });
  target.flush();
}

export interface ImageCopy {
  /** Left out: not compressed. */
  readonly compress?: Compressor | undefined;
  /** What is copied, ascending; all else is the backing file's. Left out: everything, and there is no backing file. */
  readonly spans?: readonly ByteSpan[];
  /** Bytes of the backing file's disk: below, zeros are written as such. */
  readonly backingBytes?: number;
}

/** Everything into a new image, its tables and header included. @throws as `copyToRaw` */
export async function copyToImage(
  source: Source,
  image: ImageWriter,
  { compress, spans, backingBytes = 0 }: ImageCopy,
  work: Work,
): Promise<void> {
  const { clusterBytes } = image;
  const zeros = (from: number, to: number): void => {
    const end = Math.min(to, Math.ceil(backingBytes / clusterBytes) * clusterBytes);
    if (from < end) image.zeros(end - from, from);
  };
  const data = async (bytes: Uint8Array, length: number, offset: number): Promise<void> => {
    const whole = Math.ceil(length / clusterBytes) * clusterBytes;
    bytes.fill(0, length, whole);
    if (compress !== undefined) {
      await compressEach(bytes, whole, offset, image, compress, zeros);
      return;
    }
    eachRun(bytes, whole, clusterBytes, (at, run, zero) => {
      if (zero) zeros(offset + at, offset + at + run);
      else image.data(bytes, at, run, offset + at);
    });
  };
  const all = wholeClusters(spans ?? [{ from: 0, to: source.size() }], clusterBytes, source.size());
  const total = all.reduce((sum, { from, to }) => sum + to - from, 0);
  let done = 0;
  for (const span of all) {
    const length = span.to - span.from;
    const progress = (fraction: number): void => work.progress?.((done + fraction * length) / total);
    await eachPiece(source, span, clusterBytes, { ...work, progress }, { data, hole: zeros });
    done += length;
  }
  image.finish();
}

async function compressEach(
  bytes: Uint8Array,
  length: number,
  offset: number,
  image: ImageWriter,
  compress: Compressor,
  zeros: (from: number, to: number) => void,
): Promise<void> {
  const { clusterBytes } = image;
  const clusters: (Promise<Uint8Array | undefined> | 'zeros')[] = [];
  for (let at = 0; at < length; at += clusterBytes) {
    clusters.push(isZero(bytes, at, clusterBytes) ? 'zeros' : compress(bytes.subarray(at, at + clusterBytes)));
  }
  for (const [index, compressed] of (await Promise.all(clusters)).entries()) {
    const guest = offset + index * clusterBytes;
    if (compressed === 'zeros') zeros(guest, guest + clusterBytes);
    else if (compressed === undefined) image.data(bytes, index * clusterBytes, clusterBytes, guest);
    else image.compressed(compressed, guest);
  }
}

/** The spans rounded to whole clusters, those that touch joined. */
function wholeClusters(spans: readonly ByteSpan[], clusterBytes: number, size: number): ByteSpan[] {
  const joined: { from: number; to: number }[] = [];
  for (const { from, to } of spans) {
    const first = from - (from % clusterBytes);
    const end = Math.min(size, Math.ceil(to / clusterBytes) * clusterBytes);
    const last = joined.at(-1);
    if (last !== undefined && first <= last.to) last.to = Math.max(last.to, end);
    else if (first < end) joined.push({ from: first, to: end });
  }
  return joined;
}

/**
 * Go through one span in pieces that begin at multiples of `unit`. What has any data is read, at most PIECE_BYTES at a
 * time; `hole` hears of the rest, which ends at a multiple of `unit` or at the span's end.
 */
async function eachPiece(
  source: Source,
  { from, to }: ByteSpan,
  unit: number,
  work: Work,
  visit: {
    readonly data: (bytes: Uint8Array, length: number, offset: number) => Promise<void>;
    readonly hole: (from: number, to: number) => void;
  },
): Promise<void> {
  const bytes = new Uint8Array(PIECE_BYTES);
  for (let position = from; position < to; ) {
    const found = source.nextData(position);
    const start = found < 0 ? to : Math.min(to, Math.max(position, found - (found % unit)));
    if (start > position) visit.hole(position, start);
    if (start >= to) break;
    const end = Math.min(to, Math.ceil(source.nextHole(found) / unit) * unit);
    for (position = start; position < end; position += PIECE_BYTES) {
      const length = Math.min(PIECE_BYTES, end - position);
      source.read(bytes, 0, length, position);
      await visit.data(bytes, length, position);
      work.progress?.((position - from) / (to - from));
      await giveWay();
      work.signal?.throwIfAborted();
    }
    position = end;
  }
}

/** Runs of zero units, and of others. */
function eachRun(
  bytes: Uint8Array,
  length: number,
  unit: number,
  visit: (at: number, length: number, zero: boolean) => void,
): void {
  for (let at = 0; at < length; ) {
    const zero = isZero(bytes, at, Math.min(unit, length - at));
    let end = Math.min(length, at + unit);
    while (end < length && isZero(bytes, end, Math.min(unit, length - end)) === zero)
      end = Math.min(length, end + unit);
    visit(at, end - at, zero);
    at = end;
  }
}
