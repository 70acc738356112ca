/**
 * Internal snapshots: delete, rename, go back to (qcow2 specification, "Snapshots"); take-snapshot.ts takes them. Every
 * step leaves a correct image: the snapshot table is written anew to fresh clusters, complete and durable, before one write of the header
 * switches to it; refcounts are up before that, and go down after.
 */
import { CorruptImage, FsError } from '../errors.ts';
import { allocateTable, giveBackTable } from './allocator.ts';
import { barrier, countsTooHigh, isFailed, switchHeader } from './barrier.ts';
import { dataClusters } from './data-clusters.ts';
import { beforeData, beforeMetadata } from './first-write.ts';
import { flush, flushIfRoom, waitForEarlierReads } from './flush.ts';
import { closeGate, openGate } from './gate.ts';
import { punch, truncateTail } from './give-back.ts';
import { limits } from './header.ts';
import { writeDisk, writeSnapshotTablePosition } from './header-update.ts';
import type { Image } from './image.ts';
import { number, word } from './image.ts';
import type { L1Table } from './lookup.ts';
import { noteOpenTable } from './open-tables.ts';
import { changeReferences, clearCopied, l2Tables, type Progress } from './references.ts';
import { dropMapping } from './sharing.ts';
import { encodeSnapshotTable, MAX_SNAPSHOT_TABLE_BYTES, renamedEntry, type SnapshotEntry } from './snapshot-table.ts';
import { unlink } from './unlinked.ts';

/** The snapshots of an open image, in the order of the table. Lives on the main thread, which alone changes it. */
export interface SnapshotList {
  entries: readonly SnapshotEntry[];
  /** Where the table is; 0 and 0 without snapshots. */
  tableOffset: number;
  tableBytes: number;
}

/** L1 entries that `virtualSize` bytes of disk need; VM state begins behind them. */
export const l1EntriesForSize = (image: Image, virtualSize: number): number =>
  Math.ceil(virtualSize / image.geometry.l2SpanBytes);

/** Guest offset at which the VM state of a snapshot begins. */
export const vmStateOffset = (image: Image, entry: SnapshotEntry): number =>
  l1EntriesForSize(image, entry.virtualSize) * image.geometry.l2SpanBytes;

/**
 * The L1 table of a snapshot, in shared memory of its own so that other threads can use it.
 * @throws FsError EIO if it cannot be used
 */
export function readSnapshotL1(image: Image, entry: SnapshotEntry): L1Table {
  if (entry.problem !== undefined) {
    throw new FsError('EIO', `${image.file.path}: snapshot ${entry.id} cannot be read: ${entry.problem}`);
  }
  const bytes = new Uint8Array(new SharedArrayBuffer(Math.max(8, entry.l1Entries * 8)));
  const got = image.file.read(bytes, 0, entry.l1Entries * 8, entry.l1TableOffset);
  if (got < entry.l1Entries * 8) {
    throw new FsError('EIO', `${image.file.path}: the L1 table of snapshot ${entry.id} passes the end of the file`);
  }
  const table = { view: new DataView(bytes.buffer), entries: entry.l1Entries, diskBytes: entry.virtualSize };
  noteOpenTable(image, entry.l1TableOffset, table);
  return table;
}

/**
 * Delete a snapshot: its clusters are free when nothing else refers to them.
 * @throws FsError; a failure before the header is switched changes nothing
 */
export async function deleteSnapshot(
  image: Image,
  list: SnapshotList,
  entry: SnapshotEntry,
  progress: Progress,
): Promise<void> {
  const { clusterBytes } = image.geometry;
  const snapshotL1 = readSnapshotL1(image, entry);
  await still(image, async () => {
    const next = list.entries.filter((other) => other !== entry);
    const table = tableWithout(image, list, entry, next);
    settle(image);
    switchTable(image, list, next, table);
  });
  await afterCommit(image, async () => {
    const l1 = { first: entry.l1TableOffset / clusterBytes, count: Math.ceil((entry.l1Entries * 8) / clusterBytes) };
    await dropMapping(image, snapshotL1, l1, progress);
    flush(image);
  });
}

/**
 * The newest one leaves the table by the count alone: needs no space, so that a full host has a way out.
 * @returns undefined for an empty table
 * @throws FsError ENOSPC
 */
function tableWithout(
  image: Image,
  list: SnapshotList,
  entry: SnapshotEntry,
  next: readonly SnapshotEntry[],
): NewTable | undefined {
  if (next.length === 0) return undefined;
  const newest = list.entries.at(-1) as SnapshotEntry;
  if (entry === newest) {
    const { clusterBytes } = image.geometry;
    const bytes = encodeSnapshotTable(next).length;
    return { cluster: list.tableOffset / clusterBytes, clusters: Math.ceil(bytes / clusterBytes), bytes };
  }
  try {
    return writeTable(image, next);
  } catch (error) {
    if (!(error instanceof FsError) || error.errno !== 'ENOSPC') throw error;
    throw new FsError(
      'ENOSPC',
      `${error.message}; the newest checkpoint, "${newest.name}", can be deleted all the same`,
      {
        cause: error,
      },
    );
  }
}

/** Rename: a new snapshot table, nothing else. */
export async function renameSnapshot(
  image: Image,
  list: SnapshotList,
  entry: SnapshotEntry,
  name: string,
): Promise<SnapshotEntry> {
  const renamed = renamedEntry(entry, name);
  await still(image, async () => {
    const next = list.entries.map((other) => (other === entry ? renamed : other));
    const table = writeTable(image, next);
    settle(image);
    switchTable(image, list, next, table);
  });
  return renamed;
}

/**
 * Make the live contents, and the disk's size, those of a snapshot. The new L1 table is in fresh clusters; the header
 * switches size and table at once.
 */
export async function applySnapshot(image: Image, entry: SnapshotEntry, progress: Progress): Promise<void> {
  const { clusterBytes } = image.geometry;
  await still(image, async (undo) => {
    const { numbers } = image;
    const snapshotL1 = readSnapshotL1(image, entry);
    // The snapshot's table may be longer (VM state) or shorter (the rest is unallocated) than its disk.
    const l1Entries = Math.max(1, l1EntriesForSize(image, entry.virtualSize));
    if (l1Entries * 8 > limits.L1_BYTES) {
      throw new CorruptImage(
        `${image.file.path}: snapshot ${entry.id} claims a disk of ${entry.virtualSize} bytes, more than the image can map; run vdskfs check on it`,
      );
    }
    const stored = l2Tables(snapshotL1.view, Math.min(snapshotL1.entries, l1Entries));
    const after = [...stored, ...new Array<number>(l1Entries - stored.length).fill(0)];
    const oldEntries = numbers[number.L1_ENTRIES] as number;
    const oldOffset = numbers[number.L1_OFFSET] as number;
    const before = l2Tables(image.l1, oldEntries);
    // Tables that both have keep their counts.
    const added = after.map((table, index) => (before[index] === table ? 0 : table));
    const dropped = before.map((table, index) => (after[index] === table ? 0 : table));

    const l1 = new Uint8Array(l1Entries * 8);
    const l1View = new DataView(l1.buffer);
    for (const [index, table] of after.entries()) l1View.setBigUint64(index * 8, BigInt(table));
    const newL1 = writeNewTable(image, l1);
    undo.push(() => freeTable(image, newL1));
    settle(image);
    await changeReferences(image, { tables: added, others: [], delta: 1, progress: (part) => progress(part * 0.4) });
    undo.push(() => changeReferences(image, { tables: added, others: [], delta: -1, progress: () => {} }));
    barrier(image);
    await clearCopied(image, added, (part) => progress(0.4 + part * 0.2));
    barrier(image);
    const l1Offset = newL1.cluster * clusterBytes;
    switchHeader(image, () => writeDisk(image.file, entry.virtualSize, l1Entries, l1Offset));
    image.hasNoCompressed = false;
    undo.length = 0;

    image.lock();
    const epoch = Atomics.add(image.words, word.EPOCH, 1);
    new Uint8Array(image.l1.buffer, image.l1.byteOffset, oldEntries * 8).fill(0);
    new Uint8Array(image.l1.buffer, image.l1.byteOffset).set(l1);
    numbers[number.L1_OFFSET] = l1Offset;
    numbers[number.L1_ENTRIES] = l1Entries;
    numbers[number.VIRTUAL_SIZE] = entry.virtualSize;
    for (const table of after) if (table !== 0) image.setMetadata(table / clusterBytes, 1, true);
    image.unlock();
    waitForEarlierReads(image, epoch);

    numbers[number.DATA_CLUSTERS] = -1;
    try {
      await afterCommit(image, async () => {
        await dropReferences(
          image,
          dropped,
          { first: oldOffset / clusterBytes, count: Math.ceil((oldEntries * 8) / clusterBytes) },
          (part) => progress(0.6 + part * 0.4),
        );
        settle(image);
      });
    } catch (error) {
      // The contents are the snapshot's; the space of the old ones is free when the image is opened again.
      if (!(error instanceof FsError)) throw error;
      return;
    }
    numbers[number.DATA_CLUSTERS] = dataClusters(image);
  });
}

/** Steps that take back what an operation has done so far, in the order of what it did. */
export type Undo = (() => void | Promise<void>)[];

/** Run `action`, which is over in no time and changes nothing in the file itself, on an image at rest. */
export function atRest<T>(image: Image, action: () => T): T {
  rest(image);
  try {
    return action();
  } finally {
    openGate(image);
  }
}

/**
 * Run `action` on a still image: no writes, everything flushed, caches empty of changes before and after. If it fails,
 * what is in `undo` is run, the last first; behind the switch of a header there must be nothing left in it.
 */
export async function still<T>(image: Image, action: (undo: Undo) => Promise<T>): Promise<T> {
  rest(image);
  const undo: Undo = [];
  try {
    const result = await action(undo);
    // What is durable has been done, even if tidying up fails: that flush is the last one, and the next write says so.
    orLeave(() => settle(image));
    return result;
  } catch (error) {
    await takeBack(image, undo);
    throw error;
  } finally {
    openGate(image);
  }
}

/** No writes, everything flushed, the session marked: until the gate is opened. */
function rest(image: Image): void {
  flushMost(image);
  closeGate(image);
  try {
    beforeData(image);
    flushIfRoom(image);
    image.lock();
    try {
      beforeMetadata(image);
    } finally {
      image.unlock();
    }
  } catch (error) {
    openGate(image);
    throw error;
  }
}

/** A flush that lasts no longer does not hold writers back. */
const SHORT_FLUSH_MS = 20;
const MAX_FLUSHES = 6;

/**
 * What writers have left goes out while they go on, so that there is little to wait for behind the closed gate. During a
 * long flush they leave more; each is shorter than the one before, as long as the host's disk is faster than they are.
 */
function flushMost(image: Image): void {
  let before = Number.POSITIVE_INFINITY;
  for (let count = 0; count < MAX_FLUSHES; count++) {
    const began = performance.now();
    flushIfRoom(image);
    const took = performance.now() - began;
    if (took < SHORT_FLUSH_MS || took > before) return;
    before = took;
  }
}

async function takeBack(image: Image, undo: Undo): Promise<void> {
  // The mark of the session stays then: the next opener counts anew.
  if (isFailed(image)) return;
  for (const step of undo.toReversed()) {
    try {
      await step();
    } catch {
      // The error to tell is the one before.
      countsTooHigh(image);
    }
  }
  orLeave(() => settle(image));
}

/** Run `action` where its failure must not hide what happened before; a bug still shows. */
export function orLeave(action: () => void): void {
  try {
    action();
  } catch (error) {
    if (!(error instanceof FsError)) throw error;
  }
}

/** What follows on a switched header is not taken back: if it fails, clusters stay counted that nothing uses. */
export async function afterCommit(image: Image, action: () => Promise<void>): Promise<void> {
  try {
    await action();
  } catch (error) {
    countsTooHigh(image);
    throw error;
  }
}

/** Everything in the caches goes to the file, and nothing stays in them: the file may be changed directly. */
export function settle(image: Image): void {
  flush(image);
  image.lock();
  try {
    image.l2.dropAll();
    image.refcounts.dropAll();
  } finally {
    image.unlock();
  }
}

export function freeMetadata(image: Image, first: number, clusters: number): void {
  if (clusters === 0) return;
  image.lock();
  try {
    unlink(image, first, clusters);
  } finally {
    image.unlock();
  }
}

export interface NewTable {
  readonly cluster: number;
  readonly clusters: number;
  readonly bytes: number;
}

/** A table in fresh clusters, the rest of the last one zeros. An empty table has no clusters. */
export function writeNewTable(image: Image, table: Uint8Array): NewTable {
  const { clusterBytes } = image.geometry;
  const clusters = Math.ceil(table.length / clusterBytes);
  if (clusters === 0) return { cluster: 0, clusters: 0, bytes: 0 };
  const padded = new Uint8Array(clusters * clusterBytes);
  padded.set(table);
  image.lock();
  try {
    const cluster = allocateTable(image, clusters);
    try {
      image.file.write(padded, 0, padded.length, cluster * clusterBytes);
    } catch (error) {
      giveBackTable(image, cluster, clusters);
      throw error;
    }
    return { cluster, clusters, bytes: table.length };
  } finally {
    image.unlock();
  }
}

export const freeTable = (image: Image, { cluster, clusters }: NewTable): void =>
  freeMetadata(image, cluster, clusters);

export function writeTable(image: Image, entries: readonly SnapshotEntry[]): NewTable {
  const bytes = encodeSnapshotTable(entries);
  if (bytes.length > MAX_SNAPSHOT_TABLE_BYTES) {
    throw new FsError(
      'ENOSPC',
      `${image.file.path}: the snapshot table would be larger than 64 MiB; delete a checkpoint first`,
    );
  }
  return writeNewTable(image, bytes);
}

/**
 * The commit point of every change of the list; everything that the new table needs is durable by then. It may be the
 * start of the old one, with fewer entries.
 */
export function switchTable(
  image: Image,
  list: SnapshotList,
  entries: readonly SnapshotEntry[],
  table: NewTable | undefined,
): void {
  const { clusterBytes } = image.geometry;
  const offset = table === undefined ? 0 : table.cluster * clusterBytes;
  switchHeader(image, () => writeSnapshotTablePosition(image.file, entries.length, offset));
  if (list.tableOffset !== 0) {
    const kept = table !== undefined && offset === list.tableOffset ? table.clusters : 0;
    const clusters = Math.ceil(list.tableBytes / clusterBytes);
    freeMetadata(image, list.tableOffset / clusterBytes + kept, clusters - kept);
  }
  list.entries = entries;
  list.tableOffset = offset;
  list.tableBytes = table?.bytes ?? 0;
}

/** Lower everything that a mapping refers to, and its L1 table; give the host back what nobody uses. */
async function dropReferences(
  image: Image,
  tables: readonly number[],
  l1: { readonly first: number; readonly count: number },
  progress: Progress,
): Promise<void> {
  let canPunch = true;
  let lowest = Number.MAX_SAFE_INTEGER;
  let last = { first: 0, count: 0 };
  await changeReferences(image, {
    tables,
    others: l1.count === 0 ? [] : [l1],
    delta: -1,
    progress,
    freed: (first, count) => {
      canPunch = canPunch && punch(image, first, count);
      image.setMetadata(first, count, false);
      lowest = Math.min(lowest, first);
      last = { first, count };
    },
  });
  barrier(image);
  image.lock();
  try {
    image.numbers[number.FREE_HINT] = Math.min(image.numbers[number.FREE_HINT] as number, lowest);
    if (last.count > 0) truncateTail(image, [last]);
  } finally {
    image.unlock();
  }
}
