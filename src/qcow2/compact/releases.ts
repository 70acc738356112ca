/** References that moved away from their clusters: they are given up when the new places are durable. */
import { attemptLong, countsTooHigh } from '../barrier.ts';
import { type ClusterRange, flushIfRoom, freeInPieces, lowerCounts, waitForEarlierReads } from '../flush.ts';
import type { Image } from '../image.ts';
import { word } from '../image.ts';

export class Releases {
  readonly #references = new Map<number, number>();

  add(cluster: number, references: number): void {
    if (references > 0) this.#references.set(cluster, (this.#references.get(cluster) ?? 0) + references);
  }

  /**
   * Make the new mapping durable, wait for the reads that may have seen the old one, and lower the refcounts of what
   * was left. Without the mutex; with pauses, in which this thread serves others.
   * @throws FsError ENOSPC; EIO: the image is not written any more
   */
  async commit(image: Image): Promise<void> {
    if (this.#references.size === 0) return;
    try {
      flushIfRoom(image);
    } catch (error) {
      // They stay counted where they were.
      countsTooHigh(image);
      throw error;
    }
    waitForEarlierReads(image, Atomics.add(image.words, word.EPOCH, 1));
    const ranges: (ClusterRange & { count: number; references: number })[] = [];
    for (const [cluster, references] of [...this.#references].sort(([a], [b]) => a - b)) {
      const last = ranges.at(-1);
      if (last !== undefined && last.references === references && last.first + last.count === cluster) last.count++;
      else ranges.push({ first: cluster, count: 1, references });
    }
    this.#references.clear();
    await attemptLong(image, async () => freeInPieces(image, lowerCounts(image, ranges)));
  }
}
