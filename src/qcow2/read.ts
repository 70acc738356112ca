/** Reading guest bytes: look the extent up under the mutex, read the host bytes outside of it. */
import { CorruptImage } from '../errors.ts';
import { decompressCluster } from './compression.ts';
import type { Image } from './image.ts';
import { word } from './image.ts';
import { compressedBytes, compressedOffset, kind } from './l2-entry.ts';
import type { L1Table } from './lookup.ts';
import { lookup } from './lookup.ts';
import { hex } from './units.ts';

/**
 * Fill all of `target[at, at + length)` from the guest bytes at `guest`. What no image of the chain has reads as zeros.
 * The range may lie past the virtual size (VM state does).
 * @param table a snapshot's L1 table; undefined: the live contents
 */
export function readRange(
  image: Image,
  table: L1Table | undefined,
  target: Uint8Array,
  at: number,
  length: number,
  guest: number,
): void {
  const { extent } = image;
  const entered = image.enter();
  try {
    let left = length;
    let to = at;
    let from = guest;
    while (left > 0) {
      image.lock();
      try {
        lookup(image, table, from, left);
      } finally {
        image.unlock();
      }
      const run = extent.length;
      switch (extent.kind) {
        case kind.DATA: {
          const got = image.data.read(target, to, run, extent.host);
          if (got < run) target.fill(0, to + got, to + run);
          break;
        }
        case kind.ZERO:
          target.fill(0, to, to + run);
          break;
        case kind.UNALLOCATED:
          readBacking(image, table, target, to, run, from);
          break;
        case kind.COMPRESSED:
          readCompressed(image, target, to, run, from);
          break;
      }
      to += run;
      from += run;
      left -= run;
    }
  } finally {
    image.leave(entered);
  }
}

function readBacking(
  image: Image,
  table: L1Table | undefined,
  target: Uint8Array,
  at: number,
  length: number,
  guest: number,
): void {
  const { backing } = image;
  const there = Math.max(0, Math.min(length, backedEnd(image, table) - guest));
  if (there > 0) backing?.read(target, at, there, guest);
  if (there < length) target.fill(0, at + there, at + length);
}

/** Guest offset at which the backing file ends, for what `table` maps. */
export const backedEnd = ({ backing }: Image, table: L1Table | undefined): number =>
  backing === undefined ? 0 : Math.min(backing.size(), table?.diskBytes ?? Number.POSITIVE_INFINITY);

function readCompressed(image: Image, target: Uint8Array, at: number, length: number, guest: number): void {
  const { extent, decompressed } = image;
  const { clusterBytes, clusterBits, compressionType } = image.geometry;
  // Small reads go through a cluster piece by piece: the last one is kept.
  const changes = Atomics.load(image.words, word.COMPRESSED_CHANGES);
  if (extent.high !== decompressed.high || extent.low !== decompressed.low || changes !== decompressed.changes) {
    const host = compressedOffset(extent.high, extent.low, clusterBits);
    const most = compressedBytes(extent.high, extent.low, clusterBits);
    const source = new Uint8Array(most);
    const got = image.file.read(source, 0, most, host);
    if (decompressed.bytes.length === 0) decompressed.bytes = new Uint8Array(clusterBytes);
    decompressed.high = 0;
    decompressed.low = 0;
    try {
      decompressCluster(compressionType, source, got, decompressed.bytes);
    } catch (error) {
      throw new CorruptImage(
        `${image.file.path}: the compressed cluster of guest offset ${hex(guest)} does not decompress`,
        {
          cause: error,
        },
      );
    }
    decompressed.high = extent.high;
    decompressed.low = extent.low;
    decompressed.changes = changes;
  }
  const start = guest % clusterBytes;
  target.set(decompressed.bytes.subarray(start, start + length), at);
}
