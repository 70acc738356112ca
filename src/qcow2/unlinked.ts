/**
 * Clusters that nothing in memory refers to any more, while the file still does. Their refcounts fall only after a flush
 * has made the new mapping durable and every read that may have seen the old one has ended; until then they are not
 * reused. With the mutex held.
 */
import type { Image } from './image.ts';
import { UNLINKED_CAPACITY, word } from './image.ts';

/**
 * Worth a flush. With copies of clusters of 64 KiB, one for each range, the host's disk has 128 MiB to take by then, which
 * was measured as a tenth of a second.
 */
export const unlinkedIsLong = (image: Image): boolean =>
  (image.words[word.UNLINKED_COUNT] as number) > UNLINKED_CAPACITY / 8;

/** The list is filling up: the writer flushes after its operation. */
export const unlinkedIsFull = (image: Image): boolean =>
  (image.words[word.UNLINKED_COUNT] as number) > UNLINKED_CAPACITY / 2;

/** One reference less to each of `count` adjacent clusters. */
export function unlink(image: Image, firstCluster: number, count: number): void {
  const { words, unlinked } = image;
  const ranges = words[word.UNLINKED_COUNT] as number;
  if (ranges > 0) {
    const last = (ranges - 1) * 2;
    if ((unlinked[last] as number) + (unlinked[last + 1] as number) === firstCluster) {
      unlinked[last + 1] = (unlinked[last + 1] as number) + count;
      return;
    }
  }
  // Operations check unlinkedIsFull and add far fewer ranges than the other half of the list between two checks.
  if (ranges === UNLINKED_CAPACITY) throw new Error('the list of unlinked clusters is full');
  unlinked[ranges * 2] = firstCluster;
  unlinked[ranges * 2 + 1] = count;
  words[word.UNLINKED_COUNT] = ranges + 1;
}
