/** What one image of a chain has of its own, from the tables alone: no guest data is read. */
import type { Storage } from '../storage/storage.ts';
import type { Image } from './image.ts';
import { compressedBytes, compressedOffset, kind } from './l2-entry.ts';
import { type L1Table, lookup } from './lookup.ts';

/** A run of guest bytes of one kind. */
export interface OwnExtent {
  /** Guest bytes. */
  readonly offset: number;
  /** At least 1. */
  readonly length: number;
  /** `unallocated`: what is below shows. `zero`: reads as zeros whatever is below. */
  readonly kind: 'unallocated' | 'zero' | 'data' | 'compressed';
  /**
   * Host offset in the layer's data file. `data`: of the first byte, the others follow it. `compressed`: of the
   * compressed bytes of the whole cluster. 0 for the other kinds. Two extents of one file with the same host offset (and
   * the same guest offset, if compressed) hold the same bytes.
   */
  readonly host: number;
  /** Bytes from `host` on: `length` for data; for compressed clusters what their descriptor says, up to a whole sector. */
  readonly hostBytes: number;
}

/** One image of a chain by itself, without what is below it. For the thread that made it. */
export interface OwnLayer {
  /** Bytes of the disk; behind them a layer reads as zeros, whatever is below it. */
  size(): number;
  /**
   * What the layer has at `offset`: at least 1 byte of it, at most `length`, and no more than one L2 table tells. The next
   * extent may be of the same kind.
   * @throws CorruptImage
   */
  extentAt(offset: number, length: number): OwnExtent;
}

/**
 * The live mapping of an image, or a snapshot's.
 * @param table a snapshot's L1 table; undefined: the live one, in which extents may change as soon as they are told
 * @param size of the snapshot's disk, with `table`
 */
export function imageLayer(image: Image, table?: L1Table, size?: number): OwnLayer {
  return {
    size: () => size ?? image.virtualSize(),
    extentAt: (offset, length) => imageExtent(image, table, offset, length),
  };
}

/** A raw file: data, and zeros where it has holes. Nothing shows through it. */
export function rawLayer(file: Storage): OwnLayer {
  return {
    size: () => file.size(),
    extentAt: (offset, length) => {
      const start = file.nextData(offset);
      if (start !== offset) {
        const hole = start < 0 ? length : Math.min(length, start - offset);
        return { offset, length: hole, kind: 'zero', host: 0, hostBytes: 0 };
      }
      const data = Math.min(length, file.nextHole(offset) - offset);
      return { offset, length: data, kind: 'data', host: offset, hostBytes: data };
    },
  };
}

/** All extents of [offset, offset + length), in order and without gaps; each `next` takes as long as one L2 table does. */
export function* ownExtents(layer: OwnLayer, offset: number, length: number): Generator<OwnExtent, void> {
  const end = offset + length;
  for (let position = offset; position < end; ) {
    const extent = layer.extentAt(position, end - position);
    yield extent;
    position += extent.length;
  }
}

/** Zeros that are told of at once, at most: they may have to be written. A multiple of every cluster size. */
const ZERO_RUN_BYTES = 16 * 2 ** 20;

/**
 * The same extents with neighbouring zeros in one, cut at each multiple of `ZERO_RUN_BYTES`. What small clusters say piece
 * by piece may be whole clusters of another image, which need no data then.
 */
export function* joinZeros(extents: Iterable<OwnExtent>): Generator<OwnExtent, void> {
  /** Zeros that were told of and not passed on. */
  let start = 0;
  let end = 0;
  const zeros = (until: number): OwnExtent => {
    return { offset: start, length: until - start, kind: 'zero', host: 0, hostBytes: 0 };
  };
  for (const extent of extents) {
    if (extent.kind !== 'zero') {
      if (start < end) yield zeros(end);
      start = end;
      yield extent;
      continue;
    }
    if (start === end) start = extent.offset;
    end = extent.offset + extent.length;
    for (let cut = nextCut(start); cut <= end; cut = nextCut(start)) {
      yield zeros(cut);
      start = cut;
    }
  }
  if (start < end) yield zeros(end);
}

const nextCut = (offset: number): number => (Math.floor(offset / ZERO_RUN_BYTES) + 1) * ZERO_RUN_BYTES;

function imageExtent(image: Image, table: L1Table | undefined, offset: number, length: number): OwnExtent {
  const { extent } = image;
  const { clusterBits } = image.geometry;
  image.lock();
  try {
    lookup(image, table, offset, length);
  } finally {
    image.unlock();
  }
  const found = { offset, length: extent.length };
  switch (extent.kind) {
    case kind.DATA:
      return { ...found, kind: 'data', host: extent.host, hostBytes: extent.length };
    case kind.COMPRESSED: {
      const { high, low } = extent;
      const host = compressedOffset(high, low, clusterBits);
      return { ...found, kind: 'compressed', host, hostBytes: compressedBytes(high, low, clusterBits) };
    }
    default:
      return { ...found, kind: extent.kind === kind.ZERO ? 'zero' : 'unallocated', host: 0, hostBytes: 0 };
  }
}
