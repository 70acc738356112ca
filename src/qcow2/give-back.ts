/** Giving space back to the host: holes where clusters were freed, a shorter file where they were the last ones. */
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
  const { clusterBytes } = image.geometry;
  for (const { first, count } of freed) {
    if (!image.file.punch(first * clusterBytes, count * clusterBytes)) return;
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
  image.file.truncate(end * clusterBytes);
  image.numbers[number.FRESH_FROM] = end * clusterBytes;
}
