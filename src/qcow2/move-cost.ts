/** What moving data between images of a chain would take, from the tables alone: to choose the smaller side, and to find out early that the host has no room. */
import type { Backing, Image } from './image.ts';
import { hostOf, isCompressed, isCopied } from './l2-entry.ts';
import { emptyEntry, readEntry } from './l2-update.ts';
import { l2TableAt } from './lookup.ts';
import { imageLayer, joinZeros, type OwnLayer, ownExtents } from './own-extents.ts';
import { missing } from './pull-up.ts';
import type { Steps } from './steps.ts';
import { readsAsZeros } from './write.ts';

export interface MoveCost {
  /** Guest bytes that would be read and written. */
  readonly moved: number;
  /** Host bytes that the image written to would need in addition, tables counted; an upper bound. */
  readonly allocated: number;
}

/** Runs that one step looks at, at most. */
const STEP_RUNS = 256;

/** Of `commitAll` into a qcow2 image, or into a raw file. */
export function* commitCost(upper: Image, lower: Image | { readonly raw: OwnLayer }): Steps<MoveCost> {
  const size = upper.virtualSize();
  const room = 'raw' in lower ? new RawRoom(lower.raw) : new ImageRoom(lower);
  let moved = 0;
  let looked = 0;
  for (const { offset, length, kind } of joinZeros(ownExtents(imageLayer(upper), 0, size))) {
    if (kind === 'data' || kind === 'compressed') {
      moved += length;
      room.take(offset, length);
    } else if (kind === 'zero') {
      room.zero(offset, length);
    }
    if (++looked % STEP_RUNS === 0) yield offset / size;
  }
  return { moved, allocated: room.bytes() };
}

/** Of `pullUp`. Zeros that are found as data are counted as data. */
export function* pullCost(upper: Image, between: readonly OwnLayer[], base: Backing | undefined): Steps<MoveCost> {
  const size = upper.virtualSize();
  const room = new ImageRoom(upper);
  let moved = 0;
  let looked = 0;
  for (const { offset, length, action } of missing(upper, between, base)) {
    if (action === 'copy') {
      moved += length;
      room.take(offset, length);
    } else if (action === 'zero') {
      room.map(offset, length);
    }
    if (++looked % STEP_RUNS === 0) yield offset / size;
  }
  return { moved, allocated: room.bytes() };
}

/** What a qcow2 image would have to allocate. Ranges are told in ascending order. */
class ImageRoom {
  readonly #image: Image;
  readonly #entry = emptyEntry();
  #clusters = 0;
  #tables = 0;
  #lastTable = -1;
  /** Guest bytes below are counted: a cluster may be told of twice. */
  #counted = 0;

  constructor(image: Image) {
    this.#image = image;
  }

  /** Guest bytes to be written. */
  take(offset: number, length: number): void {
    const { clusterBytes } = this.#image.geometry;
    this.map(offset, length);
    const end = Math.ceil((offset + length) / clusterBytes) * clusterBytes;
    let position = Math.max(this.#counted, offset - (offset % clusterBytes));
    this.#image.lock();
    try {
      for (; position < end; position += clusterBytes) {
        readEntry(this.#image, position, this.#entry);
        const { high, low } = this.#entry;
        if (isCompressed(high) || !isCopied(high) || hostOf(high, low) === 0) this.#clusters++;
      }
    } finally {
      this.#image.unlock();
    }
    this.#counted = Math.max(this.#counted, end);
  }

  /** Guest bytes that are to read as zeros: only clusters of which they are a part need data. */
  zero(offset: number, length: number): void {
    const { version, clusterBytes } = this.#image.geometry;
    const isOverBacking = this.#image.backing !== undefined;
    const end = offset + length;
    const firstWhole = Math.min(end, Math.ceil(offset / clusterBytes) * clusterBytes);
    // Version 2 has no zeros over a backing file but written ones.
    const noneWhole = version < 3 && isOverBacking;
    const lastWhole = noneWhole ? firstWhole : Math.max(firstWhole, end - (end % clusterBytes));
    this.#writeZeros(offset, firstWhole);
    if (firstWhole < lastWhole) this.map(firstWhole, lastWhole - firstWhole, isOverBacking);
    this.#writeZeros(lastWhole, end);
  }

  #writeZeros(from: number, to: number): void {
    if (from < to && !readsAsZeros(this.#image, from, to - from)) this.take(from, to - from);
  }

  /**
   * Guest bytes whose entries change.
   * @param missingToo also where there is no table yet
   */
  map(offset: number, length: number, missingToo = true): void {
    const { l2SpanBytes } = this.#image.geometry;
    const last = Math.floor((offset + length - 1) / l2SpanBytes);
    this.#image.lock();
    try {
      for (let index = Math.max(this.#lastTable + 1, Math.floor(offset / l2SpanBytes)); index <= last; index++) {
        const has = l2TableAt(this.#image, undefined, index) !== 0;
        if (has ? isCopied(this.#image.l1.getUint32(index * 8)) : !missingToo) continue;
        this.#lastTable = index;
        this.#tables++;
      }
    } finally {
      this.#image.unlock();
    }
  }

  bytes(): number {
    const { clusterBytes, refcountsPerBlock } = this.#image.geometry;
    const clusters = this.#clusters + this.#tables;
    return (clusters + Math.ceil(clusters / refcountsPerBlock)) * clusterBytes;
  }
}

/** What a raw file would have to allocate: its holes. */
class RawRoom {
  readonly #file: OwnLayer;
  #bytes = 0;

  constructor(file: OwnLayer) {
    this.#file = file;
  }

  take(offset: number, length: number): void {
    const inside = Math.max(0, Math.min(length, this.#file.size() - offset));
    this.#bytes += length - inside;
    for (const extent of ownExtents(this.#file, offset, inside))
      if (extent.kind === 'zero') this.#bytes += extent.length;
  }

  /** Holes, as far as the host can make them; what is one stays one. */
  zero(): void {}

  bytes(): number {
    return this.#bytes;
  }
}
