/** Giving space back to the host: holes where clusters were freed, a shorter file where they were the last ones. */
import { FsError } from '../errors.ts';
import type { Image } from './image.ts';
import { number } from './image.ts';
import { refcountOf } from './refcounts.ts';

/** Clusters of the file's end looked at in one go when it is cut off; the rest goes with a later flush. */
const TAIL_CLUSTERS = 65536;

interface ClusterRange {
  readonly first: number;
  readonly count: number;
}

/** Punch holes. Where the host file system cannot, the clusters stay allocated there and are reused later. */
export function punchFreed(image: Image, freed: readonly ClusterRange[]): void {
  for (const { first, count } of freed) if (!punch(image, first, count)) return;
}

/**
 * @returns false if the host has not taken the clusters back. Not even an error matters: they are free all the same, and
 * on a full host, where it takes space to make a hole, a discard must not be what ends the session
 */
export function punch(image: Image, first: number, count: number): boolean {
  const { clusterBytes } = image.geometry;
  try {
    return image.file.punch(first * clusterBytes, count * clusterBytes);
  } catch (error) {
    if (error instanceof FsError) return false;
    throw error;
  }
}

/** Cut free clusters off the end of the file. With the mutex held, so that nobody allocates there meanwhile. */
export function truncateTail(image: Image, freed: readonly ClusterRange[]): void {
  const { clusterBytes } = image.geometry;
  const fileClusters = Math.ceil(image.file.size() / clusterBytes);
  if (!freed.some(({ first, count }) => first + count >= fileClusters)) return;
  let end = fileClusters;
  const stop = Math.max(1, fileClusters - TAIL_CLUSTERS);
  while (end > stop && refcountOf(image, end - 1) === 0) end--;
  if (end === fileClusters) return;
  try {
    image.file.truncate(end * clusterBytes);
  } catch (error) {
    // As with holes: the file stays longer than need be.
    if (error instanceof FsError) return;
    throw error;
  }
  image.numbers[number.FRESH_FROM] = end * clusterBytes;
}
