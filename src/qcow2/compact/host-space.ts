/** Which host clusters are used and which are free, from the refcount blocks alone. */
import { setImmediate as giveWay } from 'node:timers/promises';
import { CorruptImage } from '../../errors.ts';
import type { ClusterRange } from '../flush.ts';
import type { Image } from '../image.ts';
import { getRefcount } from '../refcount-entry.ts';
import { changeRefcount, refcountBlockOf, refcountOf } from '../refcounts.ts';
import { countedClusters } from '../references.ts';
import { hex } from '../units.ts';

/** Refcount blocks read between two pauses. */
const PIECE_BYTES = 4 * 2 ** 20;

export interface HostSpace {
  /** Clusters in use. */
  readonly used: number;
  /** Behind the last cluster that is in use or in the file. */
  readonly end: number;
  /** The lowest free clusters, in ascending order. */
  readonly free: readonly ClusterRange[];
}

/**
 * Survey the image. Everything must have been flushed; writers may go on, so that what is found is already a little old.
 * @param most free clusters that are listed at most
 */
export async function surveySpace(image: Image, most: number): Promise<HostSpace> {
  const { clusterBytes, refcountsPerBlock, refcountOrder } = image.geometry;
  const fileClusters = Math.ceil(image.file.size() / clusterBytes);
  const total = Math.max(fileClusters, countedClusters(image));
  const block = new Uint8Array(clusterBytes);
  const free: { first: number; count: number }[] = [];
  let listed = 0;
  let used = 0;
  let end = fileClusters;
  let sincePause = 0;
  for (let first = 0; first < total; first += refcountsPerBlock) {
    const host = locked(image, () => refcountBlockOf(image, first));
    if (host === 0) block.fill(0);
    else if (image.file.read(block, 0, clusterBytes, host) < clusterBytes) {
      throw new CorruptImage(`${image.file.path}: the refcount block at ${hex(host)} is not in the file`);
    }
    const entries = Math.min(refcountsPerBlock, total - first);
    for (let entry = 0; entry < entries; entry++) {
      const cluster = first + entry;
      const inUse =
        refcountOrder === 4
          ? ((block[entry * 2] as number) | (block[entry * 2 + 1] as number)) !== 0
          : getRefcount(block, entry, refcountOrder) !== 0;
      if (inUse) {
        used++;
        if (cluster >= end) end = cluster + 1;
        continue;
      }
      if (listed >= most || cluster >= fileClusters || host === 0) continue;
      listed++;
      const last = free.at(-1);
      if (last !== undefined && last.first + last.count === cluster) last.count++;
      else free.push({ first: cluster, count: 1 });
    }
    sincePause += clusterBytes;
    if (sincePause >= PIECE_BYTES) {
      sincePause = 0;
      await giveWay();
    }
  }
  return { used, end, free };
}

/** Run `action` with the image's mutex held: for microseconds. */
export function locked<T>(image: Image, action: () => T): T {
  image.lock();
  try {
    return action();
  } finally {
    image.unlock();
  }
}

/**
 * Free clusters that the tail can move to, taken from the bottom up. Writers take from the same ones: each is looked at
 * again when it is taken. With the mutex held.
 */
export class Holes {
  readonly #image: Image;
  readonly #ranges: { first: number; count: number }[];
  #at = 0;

  /** @param limit only clusters below it */
  constructor(image: Image, free: readonly ClusterRange[], limit: number) {
    this.#image = image;
    this.#ranges = free
      .filter(({ first }) => first < limit)
      .map(({ first, count }) => ({ first, count: Math.min(count, limit - first) }));
  }

  /** Up to `most` adjacent clusters with a refcount of `references` each; undefined if there is none left. */
  take(most: number, references = 1): ClusterRange | undefined {
    for (; this.#at < this.#ranges.length; this.#at++) {
      const range = this.#ranges[this.#at]!;
      while (range.count > 0 && !this.#isFree(range.first)) shorten(range, 1);
      let count = 0;
      while (count < Math.min(most, range.count) && this.#isFree(range.first + count)) count++;
      if (count === 0) continue;
      const { first } = range;
      shorten(range, count);
      return this.#claim(first, count, references);
    }
    return undefined;
  }

  /** Exactly `count` adjacent clusters, for a table; undefined if there are none. */
  takeAdjacent(count: number): ClusterRange | undefined {
    for (let index = this.#at; index < this.#ranges.length; index++) {
      const range = this.#ranges[index]!;
      for (let first = range.first; first + count <= range.first + range.count; first++) {
        let free = 0;
        while (free < count && this.#isFree(first + free)) free++;
        if (free < count) {
          first += free;
          continue;
        }
        const behind = { first: first + count, count: range.first + range.count - (first + count) };
        range.count = first - range.first;
        this.#ranges.splice(index + 1, 0, behind);
        return this.#claim(first, count, 1);
      }
    }
    return undefined;
  }

  /** The cluster `cluster`, if it is free and was listed. */
  takeThis(cluster: number, references = 1): boolean {
    const range = this.#ranges[this.#at];
    if (range?.first !== cluster || range.count === 0 || !this.#isFree(cluster)) return false;
    shorten(range, 1);
    this.#claim(cluster, 1, references);
    return true;
  }

  #isFree(cluster: number): boolean {
    return refcountOf(this.#image, cluster) === 0 && !this.#image.isMetadata(cluster);
  }

  #claim(first: number, count: number, references: number): ClusterRange {
    const { clusterBytes } = this.#image.geometry;
    for (let cluster = first; cluster < first + count; cluster++) changeRefcount(this.#image, cluster, references);
    // These host bytes may have been a table once.
    this.#image.l2.drop(first * clusterBytes, (first + count) * clusterBytes);
    this.#image.refcounts.drop(first * clusterBytes, (first + count) * clusterBytes);
    return { first, count };
  }
}

function shorten(range: { first: number; count: number }, by: number): void {
  range.first += by;
  range.count -= by;
}
