/**
 * Data clusters of the tail move to holes. Write order (an arrow is a barrier): copy, and the new place's refcount → the
 * entries → the old place's refcount. After a crash in between some entries refer to the old place and some to the new
 * one, and both hold the same.
 *
 * A cluster that a writer may overwrite in place is copied with the gate closed, a few at a time; all others never change,
 * and are copied while writers go on.
 */
import { setImmediate as giveWay } from 'node:timers/promises';
import { barrier } from '../barrier.ts';
import { relieve } from '../flush.ts';
import { closeGate, openGate } from '../gate.ts';
import type { Image } from '../image.ts';
import { COPIED, hostOf, isCompressed, isCopied } from '../l2-entry.ts';
import { l2TableAt } from '../lookup.ts';
import { changeRefcount } from '../refcounts.ts';
import { highHalf, lowHalf } from '../units.ts';
import { copyClusters, readAhead } from './copy-clusters.ts';
import { locked } from './host-space.ts';
import { allKnown, checkCounted, giveBackMoves, type Move, type Pass } from './pass.ts';
import { Releases } from './releases.ts';
import { type EntryChange, switchEntry } from './switch-entries.ts';
import { role } from './tail-references.ts';

/** Moved between two barriers. */
const BATCH_BYTES = 32 * 2 ** 20;
const BATCH_CLUSTERS = 4096;
/** Copied while the gate is closed: about a millisecond. */
const GATE_BYTES = 2 ** 20;
const GATE_CLUSTERS = 256;

/** From the end of the file downwards, so that the file can be cut off at any time. */
export async function moveData(pass: Pass): Promise<void> {
  const { image, references } = pass;
  const { clusterBytes } = image.geometry;
  const most = Math.max(1, Math.min(BATCH_CLUSTERS, Math.floor(BATCH_BYTES / clusterBytes)));
  let batch: number[] = [];
  for (let cluster = references.end - 1; cluster >= references.first; cluster--) {
    if (references.roleOf(cluster) === role.DATA) batch.push(cluster);
    if (batch.length < most && cluster > references.first) continue;
    if (pass.stop()) return;
    if (batch.length > 0 && !(await moveBatch(pass, batch.toReversed()))) return;
    batch = [];
  }
}

/** @returns false when there is no hole left */
async function moveBatch(pass: Pass, clusters: readonly number[]): Promise<boolean> {
  const { image } = pass;
  const own: number[] = [];
  const shared: number[] = [];
  locked(image, () => {
    for (const cluster of clusters) {
      if (allKnown(pass, cluster)) (isOwn(pass, cluster) ? own : shared).push(cluster);
    }
  });
  const releases = new Releases();
  const sharedMoves = takeHoles(pass, shared);
  moveShared(pass, sharedMoves, releases);
  const ownMoves = takeHoles(pass, own);
  try {
    await moveOwn(pass, ownMoves, releases);
  } finally {
    await releases.commit(image);
  }
  await giveWay();
  return sharedMoves.length === shared.length && ownMoves.length === own.length;
}

/** Ascending clusters get ascending holes: what was adjacent stays so where there is room. */
function takeHoles({ image, holes, references }: Pass, clusters: readonly number[]): Move[] {
  const moves: Move[] = [];
  return locked(image, () => {
    while (moves.length < clusters.length) {
      const hole = holes.take(clusters.length - moves.length);
      if (hole === undefined) break;
      for (let index = 0; index < hole.count; index++) {
        const from = clusters[moves.length] as number;
        const expected = references.expected(from);
        if (expected > 1) changeRefcount(image, hole.first + index, expected - 1);
        moves.push({ from, to: hole.first + index, references: expected });
      }
    }
    return moves;
  });
}

/** Writers may overwrite it in place: the only entry that refers to it is the live mapping's, with COPIED. */
function isOwn({ image, references }: Pass, cluster: number): boolean {
  if (references.expected(cluster) !== 1) return false;
  const [only] = references.entriesOf(cluster);
  const l1Index = only === undefined ? -1 : (references.l1Index[only.table] as number);
  if (only === undefined || l1Index < 0) return false;
  const { l2EntryBytes, sliceBytes } = image.geometry;
  const active = l2TableAt(image, undefined, l1Index);
  if (active === 0 || !isCopied(image.l1.getUint32(l1Index * 8))) return false;
  const position = active + only.entry * l2EntryBytes;
  const high = image.l2.view.getUint32(image.l2.load(position - (position % sliceBytes)) + (position % sliceBytes));
  return (high & COPIED) !== 0;
}

const changeTo = ({ geometry }: Image, { from, to }: Move, own: boolean): EntryChange => {
  const old = from * geometry.clusterBytes;
  const host = to * geometry.clusterBytes;
  return {
    own,
    isOld: ({ high, low }) => !isCompressed(high) && hostOf(high, low) === old,
    renew: (entry) => {
      entry.high = ((entry.high & 0xff00_0000) | highHalf(host)) >>> 0;
      entry.low = ((entry.low & 0x1ff) | lowHalf(host)) >>> 0;
    },
  };
};

function moveShared(pass: Pass, moves: readonly Move[], releases: Releases): void {
  if (moves.length === 0) return;
  const { image } = pass;
  let done = 0;
  try {
    copyClusters(image, moves);
    locked(image, () => image.refcounts.writeDirty());
    barrier(image);
    for (const move of moves) {
      locked(image, () => switchOne(pass, move, false, releases));
      done++;
      relieve(image);
    }
  } catch (error) {
    locked(image, () => giveBackMoves(image, moves.slice(done)));
    throw error;
  }
}

async function moveOwn(pass: Pass, moves: readonly Move[], releases: Releases): Promise<void> {
  const { image } = pass;
  const { clusterBytes } = image.geometry;
  // Each may change a slice of the L2 cache, which must not fill up.
  const most = Math.max(1, Math.min(GATE_CLUSTERS, Math.floor(GATE_BYTES / clusterBytes), image.l2.slots >> 4));
  let done = 0;
  try {
    while (done < moves.length) {
      const some = moves.slice(done, done + most);
      relieve(image);
      readAhead(image, some);
      closeGate(image);
      try {
        copyClusters(image, some);
        for (const move of some) {
          locked(image, () => switchOne(pass, move, true, releases));
          done++;
        }
      } finally {
        openGate(image);
      }
      // Writers that met the closed gate go on.
      await giveWay();
    }
  } catch (error) {
    locked(image, () => giveBackMoves(image, moves.slice(done)));
    throw error;
  }
}

/**
 * Point all entries of one cluster to its new place; what has no entry any more is given back. With the mutex held. If it
 * throws nothing was changed, or the image has failed.
 */
function switchOne(pass: Pass, move: Move, own: boolean, releases: Releases): void {
  const { image, references } = pass;
  const change = changeTo(image, move, own);
  let found = 0;
  for (const { table, entry } of references.entriesOf(move.from)) {
    const here = switchEntry(image, references, table, entry, change, false);
    if (here < 0) found = Number.NEGATIVE_INFINITY;
    found += here;
  }
  found = Math.max(0, found);
  if (found > 0) {
    checkCounted(pass, move.from, found);
    for (const { table, entry } of references.entriesOf(move.from)) {
      switchEntry(image, references, table, entry, change, true);
    }
    releases.add(move.from, found);
    pass.moved(1);
  }
  if (found < move.references) changeRefcount(image, move.to, found - move.references);
}
