/**
 * Making the file as short as what it holds: clusters of its tail move down to free ones, and it is cut off. Writers go
 * on. It can be stopped, or die, between any two operations on the file: what has been moved stays moved, and the next
 * run goes on with the rest. The contents of the disk and its snapshots never change.
 *
 * One pass: survey the refcounts → find all that refers to the tail (tail-references.ts) → move it, from the end
 * downwards. The next pass looks again, since writers may have taken the holes, until nothing can be moved any more.
 */
import { setImmediate as giveWay } from 'node:timers/promises';
import { CorruptImage } from '../../errors.ts';
import { beforeMoving } from '../first-write.ts';
import { flush, flushIfRoom } from '../flush.ts';
import { punch, truncateTail } from '../give-back.ts';
import type { Image } from '../image.ts';
import { refcountOf } from '../refcounts.ts';
import type { SnapshotList } from '../snapshots.ts';
import { Holes, type HostSpace, locked, surveySpace } from './host-space.ts';
import { moveCompressed } from './move-compressed.ts';
import { moveData } from './move-data.ts';
import { moveL2Tables } from './move-l2-tables.ts';
import { dropEmptyBlocks, moveStructures } from './move-structures.ts';
import type { Pass } from './pass.ts';
import { findTailReferences, type TailReferences } from './tail-references.ts';

/** Clusters of the tail that one pass looks at: 16 GiB with clusters of 64 KiB. */
const PASS_CLUSTERS = 2 ** 18;
/** Writers that come and go could keep it busy for ever. Enough for 1 TiB of tail. */
const MAX_PASSES = 100;
/** A sweep during which the file changed in a way that looked like damage is made again. */
const SWEEPS = 3;

export interface CompactOptions {
  /** Fraction done, 0 to 1. */
  readonly progress: (fraction: number) => void;
  /** True: end soon, with the image whole. Asked between any two batches. */
  readonly stop?: () => boolean;
}

export interface Compaction {
  /** False: it was stopped before its end. */
  readonly finished: boolean;
  readonly clustersMoved: number;
}

/**
 * No snapshot may be taken, deleted or rolled back to meanwhile, and lazy sharing must have ended.
 * @throws FsError ENOSPC if copies find no room on the host, CorruptImage, EIO; the image is whole
 */
export async function compactImage(image: Image, list: SnapshotList, options: CompactOptions): Promise<Compaction> {
  let moved = 0;
  let toMove = 0;
  const stop = options.stop ?? ((): boolean => false);
  for (let passes = 0; passes < MAX_PASSES; passes++) {
    flushIfRoom(image);
    cutOff(image);
    const space = await surveySpace(image, PASS_CLUSTERS);
    if (space.end <= space.used) break;
    if (stop()) return { finished: false, clustersMoved: Math.round(moved) };
    toMove ||= usedBehind(space);
    const before = moved;
    await onePass(image, list, space, {
      image,
      list,
      moved: (clusters) => {
        moved += clusters;
        options.progress(Math.min(0.99, moved / Math.max(1, toMove, moved)));
      },
      stop,
    });
    if (stop()) return { finished: false, clustersMoved: Math.round(moved) };
    // Leaks and bitmaps stay; so does what found no adjacent room.
    if (moved === before && Math.ceil(image.file.size() / image.geometry.clusterBytes) >= space.end) break;
    await giveWay();
  }
  await punchHoles(image, stop);
  options.progress(1);
  return { finished: true, clustersMoved: Math.round(moved) };
}

async function onePass(
  image: Image,
  list: SnapshotList,
  space: HostSpace,
  rest: Omit<Pass, 'references' | 'holes'>,
): Promise<void> {
  locked(image, () => beforeMoving(image));
  const references = await findSafely(image, list, Math.max(space.used, space.end - PASS_CLUSTERS));
  const pass: Pass = { ...rest, references, holes: new Holes(image, space.free, references.first) };
  await moveL2Tables(pass);
  if (!pass.stop()) await moveStructures(pass);
  if (!pass.stop()) await moveCompressed(pass);
  if (!pass.stop()) await moveData(pass);
  flush(image);
  cutOff(image);
  await dropEmptyBlocks(image);
}

/** Clusters that have to go down: as many as there are holes below where the file will end. */
function usedBehind({ free, used }: HostSpace): number {
  let holes = 0;
  for (const { first, count } of free) holes += Math.max(0, Math.min(count, used - first));
  return holes;
}

async function findSafely(image: Image, list: SnapshotList, first: number): Promise<TailReferences> {
  for (let attempt = 1; ; attempt++) {
    const size = image.file.size();
    try {
      const references = await findTailReferences(image, first, () => {});
      checkList(image, list, references);
      return references;
    } catch (error) {
      // A table behind the end of the file as it was: the file has grown meanwhile.
      const grown = error instanceof CorruptImage && image.file.size() !== size && attempt < SWEEPS;
      if (!grown) throw error;
    }
  }
}

function checkList(image: Image, list: SnapshotList, { tables }: TailReferences): void {
  const found = tables.snapshots.entries;
  const same =
    found.length === list.entries.length &&
    found.every((entry, index) => entry.l1TableOffset === list.entries[index]?.l1TableOffset);
  if (!same) throw image.fail('the snapshot table in the file is not the one that was written');
}

/** Cut all free clusters off the end of the file. */
function cutOff(image: Image): void {
  for (;;) {
    const before = image.file.size();
    locked(image, () => {
      const clusters = Math.ceil(before / image.geometry.clusterBytes);
      truncateTail(image, [{ first: clusters - 1, count: 1 }]);
    });
    if (image.file.size() >= before) return;
  }
}

/** What stays free inside goes back to the host, where that has not happened yet. */
async function punchHoles(image: Image, stop: () => boolean): Promise<void> {
  const { clusterBytes } = image.geometry;
  const { free } = await surveySpace(image, PASS_CLUSTERS);
  for (const { first, count } of free) {
    if (stop()) return;
    for (let from = first; from < first + count; ) {
      const data = image.file.nextData(from * clusterBytes);
      if (data < 0) return;
      from = Math.max(from, Math.floor(data / clusterBytes));
      const punched = locked(image, () => {
        let run = 0;
        while (from + run < first + count && run < 256 && refcountOf(image, from + run) === 0) run++;
        return run === 0 || punch(image, from, run) ? run : -1;
      });
      if (punched < 0) return;
      from += Math.max(1, punched);
      await giveWay();
    }
  }
}
