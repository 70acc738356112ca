/**
 * L1 tables, the snapshot table and the refcount structures of the tail move to holes. Each is complete and durable in
 * its new place before the one write that switches to it.
 */
import { attempt, barrier, switchHeader } from '../barrier.ts';
import { type ClusterRange, flush } from '../flush.ts';
import { closeGate, openGate } from '../gate.ts';
import { writeDisk, writeRefcountTablePosition, writeSnapshotTablePosition } from '../header-update.ts';
import type { Image } from '../image.ts';
import { number, word } from '../image.ts';
import { lock, unlock } from '../mutex.ts';
import { moveOpenTables } from '../open-tables.ts';
import { changeRefcount, refcountBlockOf, refcountTableEntries } from '../refcounts.ts';
import { encodeSnapshotTable, type SnapshotEntry } from '../snapshot-table.ts';
import { locked } from './host-space.ts';
import type { Pass } from './pass.ts';
import { Releases } from './releases.ts';
import { role } from './tail-references.ts';

export async function moveStructures(pass: Pass): Promise<void> {
  const releases = new Releases();
  try {
    moveSnapshotTables(pass, releases);
    moveActiveL1(pass, releases);
    moveRefcountTable(pass, releases);
    moveRefcountBlocks(pass, releases);
  } finally {
    await releases.commit(pass.image);
  }
}

/** Whether any of these clusters is in the tail, and nothing else is in them. */
function inTail({ references }: Pass, first: number, count: number): boolean {
  if (count === 0 || first + count <= references.first) return false;
  for (let cluster = Math.max(first, references.first); cluster < first + count; cluster++) {
    if (cluster >= references.end || references.roleOf(cluster) !== role.METADATA) return false;
    if (references.expected(cluster) !== 1) return false;
  }
  return true;
}

const clustersFor = (image: Image, bytes: number): number => Math.ceil(bytes / image.geometry.clusterBytes);

/** Adjacent holes for a table of `bytes.length`, and the table in them. Not durable yet. */
function writeTable({ image, holes, moved }: Pass, bytes: Uint8Array): ClusterRange | undefined {
  const { clusterBytes } = image.geometry;
  const count = clustersFor(image, bytes.length);
  const place = locked(image, () => {
    const taken = holes.takeAdjacent(count);
    if (taken !== undefined) image.setMetadata(taken.first, count, true);
    return taken;
  });
  if (place === undefined) return undefined;
  const padded = new Uint8Array(count * clusterBytes);
  padded.set(bytes);
  try {
    image.file.write(padded, 0, padded.length, place.first * clusterBytes);
  } catch (error) {
    giveBack(image, place);
    throw error;
  }
  moved(count);
  return place;
}

function giveBack(image: Image, { first, count }: ClusterRange): void {
  locked(image, () => {
    for (let cluster = first; cluster < first + count; cluster++) changeRefcount(image, cluster, -1);
    image.setMetadata(first, count, false);
  });
}

function release(releases: Releases, first: number, count: number): void {
  for (let cluster = first; cluster < first + count; cluster++) releases.add(cluster, 1);
}

/** A snapshot's L1 table has its place in the snapshot table, which is written anew. */
function moveSnapshotTables(pass: Pass, releases: Releases): void {
  const { image, list } = pass;
  const { clusterBytes } = image.geometry;
  const copies: ClusterRange[] = [];
  const places = new Map<SnapshotEntry, number>();
  try {
    for (const entry of list.entries) {
      const bytes = entry.l1Entries * 8;
      if (entry.problem !== undefined || !inTail(pass, entry.l1TableOffset / clusterBytes, clustersFor(image, bytes))) {
        continue;
      }
      const l1 = new Uint8Array(bytes);
      image.file.read(l1, 0, bytes, entry.l1TableOffset);
      const copy = writeTable(pass, l1);
      if (copy === undefined) continue;
      copies.push(copy);
      places.set(entry, copy.first * clusterBytes);
    }
    const oldFirst = list.tableOffset / clusterBytes;
    const oldCount = clustersFor(image, list.tableBytes);
    if (places.size === 0 && !inTail(pass, oldFirst, oldCount)) return;
    const table = encodeSnapshotTable(
      list.entries.map((entry) => ({ ...entry, l1TableOffset: places.get(entry) ?? entry.l1TableOffset })),
    );
    const place = writeTable(pass, table);
    if (place === undefined) {
      for (const copy of copies) giveBack(image, copy);
      return;
    }
    copies.push(place);
    locked(image, () => image.refcounts.writeDirty());
    barrier(image);
    const offset = place.first * clusterBytes;
    locked(image, () => {
      switchHeader(image, () => writeSnapshotTablePosition(image.file, list.entries.length, offset));
    });
    copies.length = 0;
    list.tableOffset = offset;
    list.tableBytes = table.length;
    release(releases, oldFirst, oldCount);
    for (const [entry, to] of places) {
      release(releases, entry.l1TableOffset / clusterBytes, clustersFor(image, entry.l1Entries * 8));
      moveOpenTables(image, entry.l1TableOffset, to);
      entry.l1TableOffset = to;
    }
  } catch (error) {
    for (const copy of copies) giveBack(image, copy);
    throw error;
  }
}

/** With the gate closed and everything flushed nothing else writes to the table. */
function moveActiveL1(pass: Pass, releases: Releases): void {
  const { image } = pass;
  const { numbers, words, geometry } = image;
  const entries = numbers[number.L1_ENTRIES] as number;
  const count = clustersFor(image, entries * 8);
  const old = (numbers[number.L1_OFFSET] as number) / geometry.clusterBytes;
  if (!inTail(pass, old, count)) return;
  flush(image);
  closeGate(image);
  try {
    flush(image);
    lock(words, word.FLUSH_MUTEX);
    try {
      const place = writeTable(pass, new Uint8Array(image.l1.buffer, image.l1.byteOffset, entries * 8));
      if (place === undefined) return;
      const offset = place.first * geometry.clusterBytes;
      locked(image, () => image.refcounts.writeDirty());
      barrier(image);
      switchHeader(image, () => writeDisk(image.file, image.virtualSize(), entries, offset));
      numbers[number.L1_OFFSET] = offset;
      release(releases, old, count);
    } finally {
      unlock(words, word.FLUSH_MUTEX);
    }
  } finally {
    openGate(image);
  }
}

/** With the mutex held: the table does not grow meanwhile. */
function moveRefcountTable(pass: Pass, releases: Releases): void {
  const { image, holes } = pass;
  const { numbers, geometry, refcountTable } = image;
  locked(image, () => {
    const count = numbers[number.REFCOUNT_TABLE_CLUSTERS] as number;
    const old = (numbers[number.REFCOUNT_TABLE_OFFSET] as number) / geometry.clusterBytes;
    if (!inTail(pass, old, count)) return;
    const place = holes.takeAdjacent(count);
    if (place === undefined) return;
    const offset = place.first * geometry.clusterBytes;
    attempt(image, () => {
      const bytes = count * geometry.clusterBytes;
      image.file.write(new Uint8Array(refcountTable.buffer, refcountTable.byteOffset, bytes), 0, bytes, offset);
      image.refcounts.writeDirty();
      image.file.flush();
    });
    switchHeader(image, () => writeRefcountTablePosition(image.file, offset, count));
    numbers[number.REFCOUNT_TABLE_OFFSET] = offset;
    image.setMetadata(place.first, count, true);
    release(releases, old, count);
    pass.moved(count);
  });
}

function moveRefcountBlocks(pass: Pass, releases: Releases): void {
  const { image } = pass;
  for (let index = 0; index < refcountTableEntries(image); index++) {
    if (!locked(image, () => moveRefcountBlock(pass, index, releases))) return;
  }
}

/** @returns false when there is no hole left. With the mutex held: nothing is counted meanwhile. */
function moveRefcountBlock(pass: Pass, index: number, releases: Releases): boolean {
  const { image, holes } = pass;
  const { clusterBytes, refcountsPerBlock } = image.geometry;
  const old = refcountBlockOf(image, index * refcountsPerBlock);
  const cluster = old / clusterBytes;
  if (old === 0 || !inTail(pass, cluster, 1)) return true;
  const hole = holes.take(1);
  if (hole === undefined) return false;
  const host = hole.first * clusterBytes;
  attempt(image, () => {
    image.refcounts.writeDirty();
    const block = new Uint8Array(clusterBytes);
    image.file.read(block, 0, clusterBytes, old);
    image.file.write(block, 0, clusterBytes, host);
    setBlock(image, index, host);
  });
  image.refcounts.drop(old, old + clusterBytes);
  image.setMetadata(hole.first, 1, true);
  releases.add(cluster, 1);
  pass.moved(1);
  return true;
}

/**
 * Version 2 has nothing that makes others count anew after a crash: there the block is durable before the table refers
 * to it, and the table before the block is relied upon.
 */
function setBlock(image: Image, index: number, host: number): void {
  if (image.geometry.version < 3) image.file.flush();
  image.refcountTable.setBigUint64(index * 8, BigInt(host));
  const bytes = new Uint8Array(image.refcountTable.buffer, image.refcountTable.byteOffset + index * 8, 8).slice();
  image.file.write(bytes, 0, 8, (image.numbers[number.REFCOUNT_TABLE_OFFSET] as number) + index * 8);
  if (image.geometry.version < 3) image.file.flush();
}

/** Refcount blocks that count nothing any more: the file ends before what they count. */
export async function dropEmptyBlocks(image: Image): Promise<void> {
  const { clusterBytes, refcountsPerBlock } = image.geometry;
  const releases = new Releases();
  for (let index = refcountTableEntries(image) - 1; index > 0; index--) {
    if (index * refcountsPerBlock * clusterBytes < image.file.size()) break;
    locked(image, () => {
      const host = refcountBlockOf(image, index * refcountsPerBlock);
      if (host === 0) return;
      // It may stand in the range that it counts, and then counts itself.
      if (Math.floor(host / clusterBytes / refcountsPerBlock) === index || !countsNothing(image, host)) return;
      attempt(image, () => setBlock(image, index, 0));
      image.refcounts.drop(host, host + clusterBytes);
      releases.add(host / clusterBytes, 1);
    });
  }
  await releases.commit(image);
}

function countsNothing(image: Image, host: number): boolean {
  const { clusterBytes, sliceBytes } = image.geometry;
  for (let at = 0; at < clusterBytes; at += sliceBytes) {
    const position = image.refcounts.load(host + at);
    for (let byte = position; byte < position + sliceBytes; byte++) {
      if (image.refcounts.bytes[byte] !== 0) return false;
    }
  }
  return true;
}
