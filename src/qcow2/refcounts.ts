/** Refcounts of host clusters (qcow2 specification, "Host cluster management"), through the cache. */
import { FsError } from '../errors.ts';
import type { Image } from './image.ts';
import { number } from './image.ts';
import { getRefcount, maxRefcount, setRefcount } from './refcount-entry.ts';
import { hex, joinHalves } from './units.ts';

/** Host offset of the refcount block that counts `cluster`; 0: none yet, so all its counts are 0. With the mutex held. */
export function refcountBlockOf(image: Image, cluster: number): number {
  const { geometry } = image;
  const index = Math.floor(cluster / geometry.refcountsPerBlock);
  if (index >= refcountTableEntries(image)) return 0;
  const host = joinHalves(image.refcountTable.getUint32(index * 8), image.refcountTable.getUint32(index * 8 + 4));
  if (host % geometry.clusterBytes !== 0) {
    throw image.fail(`refcount table entry ${index} is ${hex(host)}, not the start of a cluster`);
  }
  return host;
}

export const refcountTableEntries = (image: Image): number =>
  ((image.numbers[number.REFCOUNT_TABLE_CLUSTERS] as number) * image.geometry.clusterBytes) / 8;

/** Refcounts in one slice of a block. */
export const countsPerSlice = (image: Image): number =>
  (image.geometry.sliceBytes * 8) / 2 ** image.geometry.refcountOrder;

/**
 * Byte position in the cache of the slice that holds the count of `cluster`, -1 without a block. With the mutex held.
 */
export function loadCounts(image: Image, cluster: number): number {
  const block = refcountBlockOf(image, cluster);
  if (block === 0) return -1;
  const slice = Math.floor((cluster % image.geometry.refcountsPerBlock) / countsPerSlice(image));
  return image.refcounts.load(block + slice * image.geometry.sliceBytes);
}

/** With the mutex held. */
export function refcountOf(image: Image, cluster: number): number {
  const position = loadCounts(image, cluster);
  if (position < 0) return 0;
  return getRefcount(sliceAt(image, position), cluster % countsPerSlice(image), image.geometry.refcountOrder);
}

/**
 * Add `delta` to the count of a cluster that has a refcount block, and return the new count. With the mutex held.
 * @throws CorruptImage below 0; FsError ENOTSUP above what the entry holds
 */
export function changeRefcount(image: Image, cluster: number, delta: number): number {
  const { refcountOrder } = image.geometry;
  const position = loadCounts(image, cluster);
  if (position < 0) throw image.fail(`host cluster ${cluster} is in use but has no refcount`);
  const slice = sliceAt(image, position);
  const index = cluster % countsPerSlice(image);
  const count = getRefcount(slice, index, refcountOrder) + delta;
  if (count < 0) throw image.fail(`host cluster ${cluster} is in use but its refcount is 0`);
  if (count > maxRefcount(refcountOrder)) {
    throw new FsError(
      'ENOTSUP',
      `${image.file.path}: a refcount of ${2 ** refcountOrder} bits cannot count to ${count}`,
    );
  }
  setRefcount(slice, index, refcountOrder, count);
  image.refcounts.markDirty(position);
  if (count === 0 && cluster < (image.numbers[number.FREE_HINT] as number)) image.numbers[number.FREE_HINT] = cluster;
  return count;
}

/** The slice at a byte position of the refcount cache. */
export const sliceAt = (image: Image, position: number): Uint8Array =>
  image.refcounts.bytes.subarray(position, position + image.geometry.sliceBytes);

/**
 * Counts of many clusters, one after another: the slice is looked up only when the next cluster is in another one. With
 * the mutex held for as long as it is used.
 */
export class RefcountCursor {
  readonly #image: Image;
  readonly #perSlice: number;
  readonly #order: number;
  #index = -1;
  #position = -1;
  #slice: Uint8Array = new Uint8Array();

  constructor(image: Image) {
    this.#image = image;
    this.#perSlice = countsPerSlice(image);
    this.#order = image.geometry.refcountOrder;
  }

  /** @throws CorruptImage if nothing counts the cluster: it is in use */
  get(cluster: number): number {
    const index = Math.floor(cluster / this.#perSlice);
    if (index !== this.#index) {
      const position = loadCounts(this.#image, cluster);
      if (position < 0) throw this.#image.fail(`host cluster ${cluster} is in use but has no refcount`);
      this.#index = index;
      this.#position = position;
      this.#slice = sliceAt(this.#image, position);
    }
    return getRefcount(this.#slice, cluster % this.#perSlice, this.#order);
  }

  /** Of the cluster that `get` was called for last. */
  set(cluster: number, count: number): void {
    setRefcount(this.#slice, cluster % this.#perSlice, this.#order, count);
    this.#image.refcounts.markDirty(this.#position);
  }
}
