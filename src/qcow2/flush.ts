/**
 * Bringing the changes to the file. Write order (an arrow is a barrier, fdatasync):
 *
 *  1. data and refcounts that went up → L2 entries that point to them → L1 entries → refcounts that go down.
 *  2. A new L2 table is complete in the file before step 1 begins; so is a new refcount block (allocator.ts).
 *  3. The dirty bit (version 3) is durable before the first of all these (first-write.ts).
 *  4. Clusters are handed out again only after their refcount has fallen, that is after the unlinking is durable, after
 *     every read that began before it has ended, and after the host got the space back.
 *
 * A crash between two arrows leaves clusters counted that nothing uses: leaks, no more; the dirty bit tells the next
 * opener to count anew.
 */
import { setImmediate as giveWay } from 'node:timers/promises';
import { attempt, attemptIfRoom, barrier, countsTooHigh, isFailed } from './barrier.ts';
import { punchFreed, truncateTail } from './give-back.ts';
import type { Image } from './image.ts';
import { number, UNLINKED_CAPACITY, word } from './image.ts';
import { writeL1Entries } from './l1-blocks.ts';
import { lock, unlock } from './mutex.ts';
import { changeRefcount, RefcountCursor } from './refcounts.ts';
import type { ClusterSet } from './references.ts';
import { unlink, unlinkedIsFull, unlinkedIsLong } from './unlinked.ts';

/**
 * Everything that was written before the call is durable when it returns. Several callers share one flush.
 * @throws FsError EIO; after a failed flush the image is not written any more
 */
export function flush(image: Image): void {
  flushShared(image, false);
}

/**
 * The same where nothing has been changed yet that needs it: a host without room for what is to be overwritten (one that
 * copies on write, as ZFS and btrfs do) ends nothing, all changes stay in memory for the next flush.
 * @throws FsError ENOSPC; EIO as `flush`
 */
export function flushIfRoom(image: Image): void {
  flushShared(image, true);
}

function flushShared(image: Image, keep: boolean): void {
  image.checkUsable();
  const { words } = image;
  image.lock();
  const clean = isClean(image);
  const begun = words[word.FLUSH_COUNT] as number;
  image.unlock();
  if (clean) {
    flushData(image);
    return;
  }
  lock(words, word.FLUSH_MUTEX);
  try {
    // Another thread's flush may have begun and ended while this one waited: it took these changes along.
    if (Atomics.load(words, word.FLUSH_COUNT) - begun < 1) flushHeld(image, keep);
    else image.checkUsable();
  } finally {
    unlock(words, word.FLUSH_MUTEX);
  }
}

/** Changed slices must not fill the cache, nor unlinked clusters their list. Outside of any operation. */
export function relieve(image: Image): void {
  if (image.l2.unevictable() > image.l2.slots / 4 || unlinkedIsLong(image)) flushIfRoom(image);
}

/**
 * The same for those whom a client waits for: only when there is no room for more, since a flush lasts as long as the
 * host's disk needs for everything that was written. `tidy` comes before that.
 */
export function relieveFull(image: Image): void {
  if (image.l2.unevictable() > image.l2.slots / 2 || unlinkedIsFull(image)) flushIfRoom(image);
}

/** What nobody waits for: flush early, unless a flush is under way. */
export function tidy(image: Image): void {
  if (Atomics.load(image.words, word.FLUSHING) === 0) relieve(image);
}

function isClean(image: Image): boolean {
  const { words } = image;
  return (
    image.l2.dirtyCount() === 0 &&
    (!image.geometry.writable || image.refcounts.dirtyCount() === 0) &&
    words[word.L1_DIRTY_FROM] === words[word.L1_DIRTY_TO] &&
    words[word.UNLINKED_COUNT] === 0 &&
    words[word.FLUSHING] === 0
  );
}

function flushData(image: Image): void {
  attempt(image, () => {
    image.data.flush();
    if (image.data !== image.file) image.file.flush();
  });
}

/** What a flush takes out of memory, and brings to the file. */
interface Staged {
  l2Offsets: number[];
  l2: Uint8Array;
  /** Index of the first entry in `l1`. */
  readonly l1From: number;
  readonly l1: Uint8Array;
  readonly unlinked: readonly ClusterRange[];
  readonly epoch: number;
}

/**
 * The flush itself, with FLUSH_MUTEX held.
 * @param keep without room on the host, put everything back and throw ENOSPC; else that is a failure as any other
 */
function flushHeld(image: Image, keep: boolean): void {
  const { words } = image;
  const staged = put(image, keep, undefined, () => stage(image));
  flushData(image);
  if (staged.l2Offsets.length > 0) {
    put(image, keep, staged, () => writeSlices(image, staged.l2Offsets, staged.l2));
    barrier(image);
    image.lock();
    image.l2.written(staged.l2Offsets);
    image.unlock();
    staged.l2Offsets = [];
  }
  if (staged.l1.length > 0) {
    const position = (image.numbers[number.L1_OFFSET] as number) + staged.l1From * 8;
    put(image, keep, staged, () => writeL1Entries(image, staged.l1, position));
    barrier(image);
  }
  if (staged.unlinked.length > 0) {
    waitForEarlierReads(image, staged.epoch);
    try {
      put(image, keep, undefined, () => releaseClusters(image, staged.unlinked));
    } catch (error) {
      // At worst they stay counted. What has been lowered reaches the file with a later flush.
      countsTooHigh(image);
      words[word.FLUSHING] = 0;
      throw error;
    }
  }
  words[word.FLUSHING] = 0;
}

function stage(image: Image): Staged {
  const { words, l2 } = image;
  image.lock();
  try {
    // First: without room for these nothing has been taken out.
    if (image.geometry.writable) image.refcounts.writeDirty();
    Atomics.add(words, word.FLUSH_COUNT, 1);
    words[word.FLUSHING] = 1;
    const epoch = Atomics.add(words, word.EPOCH, 1);
    const l2Offsets: number[] = [];
    const slices = l2.stage(l2Offsets);
    const l1From = words[word.L1_DIRTY_FROM] as number;
    const l1Bytes = ((words[word.L1_DIRTY_TO] as number) - l1From) * 8;
    const l1 = new Uint8Array(image.l1.buffer, image.l1.byteOffset + l1From * 8, l1Bytes).slice();
    words[word.L1_DIRTY_FROM] = words[word.L1_DIRTY_TO] = 0;
    return { l2Offsets, l2: slices, l1From, l1, unlinked: takeUnlinked(image), epoch };
  } finally {
    image.unlock();
  }
}

/** Writes of a flush, which may all be done again. @param staged to be put back */
function put<T>(image: Image, keep: boolean, staged: Staged | undefined, write: () => T): T {
  if (!keep) return attempt(image, write);
  try {
    return attemptIfRoom(image, write);
  } catch (error) {
    if (staged !== undefined && !isFailed(image)) putBack(image, staged);
    throw error;
  }
}

/** As if the flush had not begun: who waited for it flushes, too. */
function putBack(image: Image, { l2Offsets, l1From, l1, unlinked }: Staged): void {
  const { words } = image;
  image.lock();
  try {
    image.l2.unstage(l2Offsets);
    if (l1.length > 0) {
      image.markL1Dirty(l1From);
      image.markL1Dirty(l1From + l1.length / 8 - 1);
    }
    for (const { first, count } of unlinked) {
      if ((words[word.UNLINKED_COUNT] as number) < UNLINKED_CAPACITY) unlink(image, first, count);
      else countsTooHigh(image);
    }
    Atomics.sub(words, word.FLUSH_COUNT, 1);
    words[word.FLUSHING] = 0;
  } finally {
    image.unlock();
  }
}

/** In the order of the file. */
function writeSlices(image: Image, offsets: readonly number[], staged: Uint8Array): void {
  const { sliceBytes } = image.geometry;
  const order = offsets.map((_, index) => index).sort((a, b) => offsets[a]! - offsets[b]!);
  for (const index of order) image.file.write(staged, index * sliceBytes, sliceBytes, offsets[index]!);
}

function takeUnlinked(image: Image): { first: number; count: number }[] {
  const { words, unlinked } = image;
  const ranges = [];
  for (let index = 0; index < (words[word.UNLINKED_COUNT] as number); index++) {
    ranges.push({ first: unlinked[index * 2] as number, count: unlinked[index * 2 + 1] as number });
  }
  words[word.UNLINKED_COUNT] = 0;
  return ranges;
}

/** Reads last as long as one host read, so that waiting means yielding the processor a few times. */
export function waitForEarlierReads(image: Image, epoch: number): void {
  const { words } = image;
  for (let thread = 0; thread < Atomics.load(words, word.THREADS); thread++) {
    if (thread === image.thread) continue;
    for (;;) {
      const since = Atomics.load(words, word.ACTIVE + thread);
      if (since === 0 || since - epoch > 0) break;
      Atomics.wait(words, word.ACTIVE + thread, since, 1);
    }
  }
}

export interface ClusterRange {
  readonly first: number;
  readonly count: number;
  /** How many references less each of them has; 1 if it is not said. */
  readonly references?: number;
}

/** Lower the refcounts; what falls to 0 goes back to the host first, and is free for everyone after that. */
export function releaseClusters(image: Image, ranges: readonly ClusterRange[], single?: ClusterSet): void {
  freeClusters(image, lowerCounts(image, ranges, single));
}

/**
 * Lower the refcounts, but for those that would fall to 0: they are returned, with a count of 1, for `freeClusters`.
 * @param single collects the clusters whose refcount came to be exactly 1
 */
export function lowerCounts(image: Image, ranges: readonly ClusterRange[], single?: ClusterSet): ClusterRange[] {
  const freed: { first: number; count: number }[] = [];
  image.lock();
  try {
    const counts = new RefcountCursor(image);
    for (const { first, count, references = 1 } of ranges) {
      for (let cluster = first; cluster < first + count; cluster++) {
        const before = counts.get(cluster);
        if (before < references) throw image.fail(`host cluster ${cluster} is in use but its refcount is ${before}`);
        if (before > references) {
          counts.set(cluster, before - references);
          if (before - references === 1) single?.add(cluster);
          continue;
        }
        // Nobody takes it before its count is 0, which comes last.
        if (references > 1) counts.set(cluster, 1);
        const last = freed.at(-1);
        if (last !== undefined && last.first + last.count === cluster) last.count++;
        else freed.push({ first: cluster, count: 1 });
      }
    }
  } finally {
    image.unlock();
  }
  return freed;
}

/** The last reference to these is gone. Each run may cost the host a fraction of a millisecond. */
export function freeClusters(image: Image, freed: readonly ClusterRange[]): void {
  // Nobody else can touch these: not referenced, not free.
  punchFreed(image, freed);
  image.lock();
  try {
    for (const { first, count } of freed) {
      for (let cluster = first; cluster < first + count; cluster++) changeRefcount(image, cluster, -1);
      image.setMetadata(first, count, false);
    }
    truncateTail(image, freed);
    image.refcounts.writeDirty();
  } finally {
    image.unlock();
  }
}

/** Runs of clusters freed between two pauses. */
const RUNS_AT_ONCE = 32;

/** The same a few runs at a time: who asks this thread for something meanwhile, as a write at a closed gate does, is answered. */
export async function freeInPieces(image: Image, freed: readonly ClusterRange[]): Promise<void> {
  for (let at = 0; at < freed.length; at += RUNS_AT_ONCE) {
    if (at > 0) await giveWay();
    freeClusters(image, freed.slice(at, at + RUNS_AT_ONCE));
  }
}
