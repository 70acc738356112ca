/**
 * L2 tables of the tail move to holes. One that is the live mapping's own is copied as the cache has it, and its L1 entry
 * follows with the next flush. Shared ones never change: they are copied first, then each L1 table that refers to them is
 * changed in its place, also those that readers of snapshots have in memory.
 */
import { setImmediate as giveWay } from 'node:timers/promises';
import { attempt, barrier } from '../barrier.ts';
import type { Image } from '../image.ts';
import { hostOf, isCopied } from '../l2-entry.ts';
import { setL1Entry } from '../l2-update.ts';
import { l2TableAt } from '../lookup.ts';
import { openTablesAt } from '../open-tables.ts';
import { changeRefcount, refcountOf } from '../refcounts.ts';
import { highHalf, lowHalf } from '../units.ts';
import { copyClusters } from './copy-clusters.ts';
import { locked } from './host-space.ts';
import { allKnown, checkCounted, giveBackMoves, type Move, type Pass } from './pass.ts';
import { Releases } from './releases.ts';
import { type L1Place, role } from './tail-references.ts';

/** Moved between two barriers. */
const BATCH_BYTES = 8 * 2 ** 20;
const BATCH_TABLES = 1024;

interface TableMove extends Move {
  readonly table: number;
}

export async function moveL2Tables(pass: Pass): Promise<void> {
  const { image, references } = pass;
  const most = Math.max(1, Math.min(BATCH_TABLES, Math.floor(BATCH_BYTES / image.geometry.clusterBytes)));
  let next = references.l2Cluster.length - 1;
  while (next >= 0 && (references.l2Cluster[next] as number) >= references.first) {
    if (pass.stop()) return;
    const batch: number[] = [];
    while (batch.length < most && next >= 0 && (references.l2Cluster[next] as number) >= references.first) {
      if (references.roleOf(references.l2Cluster[next] as number) === role.L2_TABLE) batch.push(next);
      next--;
    }
    const room = await moveBatch(pass, batch);
    await giveWay();
    if (!room) return;
  }
}

/** @returns false when there is no hole left */
async function moveBatch(pass: Pass, tables: readonly number[]): Promise<boolean> {
  const { image } = pass;
  const releases = new Releases();
  const shared: TableMove[] = [];
  let room = true;
  try {
    for (const table of tables) {
      room = locked(image, () => moveIfOwn(pass, table, releases) || takeForShared(pass, table, shared));
      if (!room) break;
    }
    moveShared(pass, shared, releases);
  } finally {
    await releases.commit(image);
  }
  return room;
}

/** @returns false if it is not the live mapping's own */
function moveIfOwn(pass: Pass, table: number, releases: Releases): boolean {
  const { image, references, holes } = pass;
  const { clusterBytes, sliceBytes } = image.geometry;
  const cluster = references.l2Cluster[table] as number;
  const l1Index = references.l1Index[table] as number;
  const old = cluster * clusterBytes;
  if (l1Index < 0 || (references.snapshotReferences[table] as number) > 0) return false;
  if (l2TableAt(image, undefined, l1Index) !== old || !isCopied(image.l1.getUint32(l1Index * 8))) return false;
  if (refcountOf(image, cluster) !== 1) return false;
  const hole = holes.take(1);
  if (hole === undefined) return false;
  const host = hole.first * clusterBytes;
  const bytes = new Uint8Array(clusterBytes);
  try {
    for (let at = 0; at < clusterBytes; at += sliceBytes) {
      const position = image.l2.load(old + at);
      bytes.set(image.l2.bytes.subarray(position, position + sliceBytes), at);
    }
    image.file.write(bytes, 0, clusterBytes, host);
  } catch (error) {
    changeRefcount(image, hole.first, -1);
    throw error;
  }
  // What was changed in it is in the new place, which is durable before the L1 entry is written.
  image.l2.drop(old, old + clusterBytes);
  adopt(pass, table, hole.first);
  renewActive(image, l1Index, host);
  releases.add(cluster, 1);
  return true;
}

/** @returns false when there is no hole left */
function takeForShared(pass: Pass, table: number, shared: TableMove[]): boolean {
  const { image, references, holes } = pass;
  const cluster = references.l2Cluster[table] as number;
  if (!allKnown(pass, cluster)) return true;
  const expected = references.expected(cluster);
  const hole = holes.take(1, expected);
  if (hole === undefined) return false;
  image.setMetadata(hole.first, 1, true);
  shared.push({ table, from: cluster, to: hole.first, references: expected });
  return true;
}

function moveShared(pass: Pass, moves: readonly TableMove[], releases: Releases): void {
  if (moves.length === 0) return;
  const { image } = pass;
  let done = 0;
  try {
    // Adjacent ones in ascending order.
    copyClusters(image, moves.toReversed());
    locked(image, () => image.refcounts.writeDirty());
    barrier(image);
    for (const move of moves) {
      locked(image, () => switchTable(pass, move, releases));
      done++;
    }
  } catch (error) {
    const left = moves.slice(done);
    locked(image, () => {
      giveBackMoves(image, left);
      for (const { to } of left) image.setMetadata(to, 1, false);
    });
    throw error;
  }
}

function switchTable(pass: Pass, { table, from, to, references: expected }: TableMove, releases: Releases): void {
  const { image, references } = pass;
  const { clusterBytes } = image.geometry;
  const old = from * clusterBytes;
  const host = to * clusterBytes;
  const l1Index = references.l1Index[table] as number;
  const active = l1Index >= 0 && l2TableAt(image, undefined, l1Index) === old;
  const places = references.l1Places.get(table) ?? [];
  const mine = active && isCopied(image.l1.getUint32(l1Index * 8));
  // Its own by now, or not all places known: it stays.
  const stays = mine || places.length !== references.snapshotReferences[table];
  const found = stays ? 0 : places.length + (active ? 1 : 0);
  if (found > 0) {
    checkCounted(pass, from, found);
    for (const place of places) renewSnapshot(pass, place, old, host);
    if (active) renewActive(image, l1Index, host);
    releases.add(from, found);
    image.l2.drop(old, old + clusterBytes);
    adopt(pass, table, to);
  } else {
    image.setMetadata(to, 1, false);
  }
  if (found < expected) changeRefcount(image, to, found - expected);
}

function adopt({ image, references, moved }: Pass, table: number, cluster: number): void {
  image.setMetadata(cluster, 1, true);
  references.l2Cluster[table] = cluster;
  moved(1);
}

/** The flags of an L1 entry stay. */
function renewActive(image: Image, l1Index: number, host: number): void {
  const flags = image.l1.getUint32(l1Index * 8) & 0x8000_0000;
  setL1Entry(image, l1Index, (flags | highHalf(host)) >>> 0, lowHalf(host));
}

function renewSnapshot({ image, list }: Pass, { snapshot, index }: L1Place, old: number, host: number): void {
  const entry = list.entries[snapshot];
  if (entry === undefined) throw new Error('the list of snapshots changed while the image was compacted');
  const bytes = new Uint8Array(8);
  const view = new DataView(bytes.buffer);
  const position = entry.l1TableOffset + index * 8;
  image.file.read(bytes, 0, 8, position);
  if (hostOf(view.getUint32(0), view.getUint32(4)) !== old) {
    throw image.fail(`the L1 table of snapshot ${entry.id} has changed, which it never may`);
  }
  const renew = (table: DataView, at: number): void => {
    if (hostOf(table.getUint32(at), table.getUint32(at + 4)) !== old) return;
    table.setUint32(at, ((table.getUint32(at) & 0xff00_0000) | highHalf(host)) >>> 0);
    table.setUint32(at + 4, lowHalf(host));
  };
  renew(view, 0);
  attempt(image, () => image.file.write(bytes, 0, 8, position));
  for (const { view: open, entries } of openTablesAt(image, entry.l1TableOffset))
    if (index < entries) renew(open, index * 8);
}
