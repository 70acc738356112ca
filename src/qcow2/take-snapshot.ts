/**
 * Taking an internal snapshot in two steps: `freezeSnapshot` keeps what the live disk maps at one instant, in memory and
 * in the refcounts; `publishSnapshot` writes its tables and switches the header to them. In between, guest state can be
 * put beside the disk (vm-state.ts), and a crash leaves nothing: no table in the file refers to a frozen snapshot, and the
 * mark of the session makes the next opener count the refcounts anew.
 */
import { FsError } from '../errors.ts';
import { barrier, countsTooHigh, isFailed } from './barrier.ts';
import { flush, flushIfRoom } from './flush.ts';
import { limits } from './header.ts';
import type { Image } from './image.ts';
import { number } from './image.ts';
import { COPIED } from './l2-entry.ts';
import { maxRefcount } from './refcount-entry.ts';
import {
  ClusterSet,
  changeReferences,
  clearCopied,
  countedClusters,
  l2Tables,
  type Progress,
  setCopied,
} from './references.ts';
import { beginSharing, canShareLater, dropMapping, finishSharing } from './sharing.ts';
import { newSnapshotEntry, type SnapshotEntry } from './snapshot-table.ts';
import {
  atRest,
  freeTable,
  l1EntriesForSize,
  type NewTable,
  orLeave,
  type SnapshotList,
  settle,
  still,
  switchTable,
  type Undo,
  writeNewTable,
  writeTable,
} from './snapshots.ts';
import { coverBacking, type StateArea, trimState } from './vm-state.ts';

/** What the live disk was at one instant; lives on the main thread. */
export interface FrozenSnapshot {
  readonly timeMs: number;
  readonly virtualSize: number;
  /** Its L1 table as in a file, without COPIED: the disk's part. An empty disk has no entries. */
  readonly l1: Uint8Array;
  /** The refcounts do not tell yet of all tables that it shares with the live disk (sharing.ts). */
  readonly sharedLater: boolean;
}

/** What a snapshot table entry says of a snapshot beyond its disk. */
export interface SnapshotFields {
  readonly name: string;
  /** State of the guest, whose writers have ended. */
  readonly state?: { readonly area: StateArea; readonly bytes: number } | undefined;
  /** See `newSnapshotEntry`. */
  readonly application?: Uint8Array | undefined;
}

/**
 * Take a snapshot of the live contents. Writes wait for a moment; reads go on.
 * @throws FsError ENOTSUP if the format cannot hold it, ENOSPC; nothing has changed then
 */
export async function takeSnapshot(
  image: Image,
  list: SnapshotList,
  fields: { readonly name: string; readonly timeMs: number },
  progress: Progress,
): Promise<SnapshotEntry> {
  const frozen = await freezeSnapshot(image, list, fields.timeMs, progress);
  try {
    return await publishSnapshot(image, list, frozen, fields, progress);
  } catch (error) {
    await abandonSnapshot(image, frozen);
    throw error;
  }
}

/**
 * Keep what the live disk holds now. No other operation on snapshots, sizes or the mapping as a whole may run until it is
 * published or abandoned; writes may.
 * @throws FsError ENOTSUP if the format cannot hold it, ENOSPC; nothing has changed then
 */
export async function freezeSnapshot(
  image: Image,
  list: SnapshotList,
  timeMs: number,
  progress: Progress,
): Promise<FrozenSnapshot> {
  checkPossible(image, list);
  const frozen = (l1: Uint8Array, sharedLater: boolean): FrozenSnapshot => ({
    timeMs,
    virtualSize: image.virtualSize(),
    l1,
    sharedLater,
  });
  if (await canShareLater(image, l2Tables(image.l1, diskEntries(image)))) {
    return atRest(image, () => {
      const l1 = activeL1(image, diskEntries(image), false);
      beginSharing(image, l1.length / 8);
      return frozen(l1, true);
    });
  }
  return still(image, async (undo) => {
    const l1 = activeL1(image, diskEntries(image), false);
    settle(image);
    await shareStill(image, l1.length / 8, undo, progress);
    return frozen(l1, false);
  });
}

/** Ahead of `freezeSnapshot`, while the guest still runs: looks at what need not be looked at then, and flushes. */
export async function prepareSnapshot(image: Image): Promise<void> {
  await canShareLater(image, l2Tables(image.l1, diskEntries(image)));
  flushIfRoom(image);
}

/** L1 entries of the live disk. An empty disk has none. */
const diskEntries = (image: Image): number =>
  Math.min(image.numbers[number.L1_ENTRIES] as number, l1EntriesForSize(image, image.virtualSize()));

/**
 * Bring a frozen snapshot into the snapshot table, durably. Writers go on.
 * @throws FsError ENOSPC, EIO: it is not there, and still frozen, to be abandoned
 */
export async function publishSnapshot(
  image: Image,
  list: SnapshotList,
  frozen: FrozenSnapshot,
  fields: SnapshotFields,
  progress: Progress,
): Promise<SnapshotEntry> {
  const { clusterBytes } = image.geometry;
  const tables: NewTable[] = [];
  let entry: SnapshotEntry;
  let switching = false;
  try {
    if (fields.state !== undefined) coverState(image, frozen, fields.state);
    const l1Bytes = withState(image, frozen, fields.state);
    const l1 = writeNewTable(image, l1Bytes);
    tables.push(l1);
    entry = newSnapshotEntry(
      {
        l1TableOffset: l1.cluster * clusterBytes,
        l1Entries: l1Bytes.length / 8,
        id: nextId(list.entries),
        name: fields.name,
        seconds: Math.floor(frozen.timeMs / 1000),
        nanoseconds: Math.floor(frozen.timeMs % 1000) * 1_000_000,
        virtualSize: frozen.virtualSize,
        vmStateSize: fields.state?.bytes ?? 0,
      },
      fields.application,
    );
    const next = [...list.entries, entry];
    const table = writeTable(image, next);
    tables.push(table);
    flushIfRoom(image);
    switching = true;
    switchTable(image, list, next, table);
  } catch (error) {
    // Behind a switch that failed nobody knows which tables count.
    if (!switching) for (const table of tables) freeTable(image, table);
    throw error;
  }
  if (frozen.sharedLater) await finishSharing(image, frozen.l1.length / 8, progress);
  // What is durable has been done, even if tidying up fails: that flush is the last one, and the next write says so.
  orLeave(() => flush(image));
  return entry;
}

/** The snapshot's L1 table: the disk's part, and behind it the state's. */
function withState(image: Image, { l1 }: FrozenSnapshot, state: SnapshotFields['state']): Uint8Array {
  if (state === undefined) return l1;
  return Buffer.concat([l1, trimState(image, state.area, state.bytes)]);
}

/** Where the backing file is longer than the disk, QEMU would show its bytes in the holes of the state. */
function coverState(image: Image, { l1 }: FrozenSnapshot, { area, bytes }: { area: StateArea; bytes: number }): void {
  const start = (l1.length / 8) * image.geometry.l2SpanBytes;
  const backed = (image.backing?.size() ?? 0) - start;
  if (backed > 0) coverBacking(image, area, Math.min(bytes, backed));
}

/** Let go of a frozen snapshot: what the live disk alone has left is its own again. Writers go on. */
export async function abandonSnapshot(image: Image, frozen: FrozenSnapshot): Promise<void> {
  // The mark of the session stays then: the next opener counts anew.
  if (isFailed(image)) return;
  const progress = (): void => {};
  const l1Entries = frozen.l1.length / 8;
  try {
    if (frozen.sharedLater) await finishSharing(image, l1Entries, progress);
    const mapping = { view: new DataView(frozen.l1.buffer, frozen.l1.byteOffset), entries: l1Entries };
    await dropMapping(image, mapping, { first: 0, count: 0 }, progress);
    flush(image);
  } catch (error) {
    countsTooHigh(image);
    if (!(error instanceof FsError)) throw error;
  }
}

/** Share the live mapping with a snapshot that is about to be, in one sweep behind the closed gate. Durable. */
async function shareStill(image: Image, l1Entries: number, undo: Undo, progress: Progress): Promise<void> {
  const tables = l2Tables(image.l1, l1Entries);
  await changeReferences(image, { tables, others: [], delta: 1, progress: (part) => progress(part * 0.6) });
  undo.push(() => unshare(image, tables, l1Entries));
  barrier(image);
  await clearCopied(image, tables, (part) => progress(0.6 + part * 0.4));
  shareL1(image, l1Entries);
  storeActiveL1(image, l1Entries);
  barrier(image);
}

/** Take the references of a snapshot back that did not come to be. */
async function unshare(image: Image, tables: readonly number[], l1Entries: number): Promise<void> {
  const single = new ClusterSet(countedClusters(image));
  const progress = (): void => {};
  await changeReferences(image, { tables, others: [], delta: -1, progress, single });
  barrier(image);
  await setCopied(image, tables, single, progress);
  ownL1(image, tables, single);
  storeActiveL1(image, l1Entries);
}

/** What can be known before anything is touched. */
function checkPossible(image: Image, list: SnapshotList): void {
  const { path } = image.file;
  if (image.geometry.externalData) {
    throw new FsError(
      'ENOTSUP',
      `${path} keeps its data in an external data file, which the format has no snapshots for`,
    );
  }
  if (maxRefcount(image.geometry.refcountOrder) < 2) {
    throw new FsError(
      'ENOTSUP',
      `${path} has refcounts of 1 bit, so that no cluster can be shared with a checkpoint; copy the disk to an image with 16 bits (qemu-img convert -O qcow2)`,
    );
  }
  if (list.entries.length >= limits.SNAPSHOTS) {
    throw new FsError(
      'ENOSPC',
      `${path} has ${limits.SNAPSHOTS} checkpoints, the most the format allows; delete one first`,
    );
  }
}

/** QEMU numbers snapshots: one more than the largest number that is an ID. */
function nextId(entries: readonly SnapshotEntry[]): string {
  let highest = 0;
  for (const { id } of entries) {
    if (/^\d{1,15}$/.test(id)) highest = Math.max(highest, Number(id));
  }
  return String(highest + 1);
}

/** A copy of the active L1 table, with or without COPIED. */
function activeL1(image: Image, entries: number, copied: boolean): Uint8Array {
  const bytes = new Uint8Array(image.l1.buffer, image.l1.byteOffset, entries * 8).slice();
  if (!copied) for (let at = 0; at < bytes.length; at += 8) bytes[at] = (bytes[at] as number) & 0x7f;
  return bytes;
}

/** After `changeReferences` raised everything: no L2 table is the active mapping's own. */
function shareL1(image: Image, entries: number): void {
  image.lock();
  for (let index = 0; index < entries; index++) {
    image.l1.setUint32(index * 8, (image.l1.getUint32(index * 8) & ~COPIED) >>> 0);
  }
  image.unlock();
}

/** L2 tables with a refcount of one are the active mapping's own again. */
function ownL1(image: Image, tables: readonly number[], single: ClusterSet): void {
  image.lock();
  for (const [index, table] of tables.entries()) {
    if (table === 0 || !single.has(table / image.geometry.clusterBytes)) continue;
    image.l1.setUint32(index * 8, (image.l1.getUint32(index * 8) | COPIED) >>> 0);
  }
  image.unlock();
}

/** Write the active L1 table, as it is in memory, to its place. */
function storeActiveL1(image: Image, entries: number): void {
  const bytes = activeL1(image, entries, true);
  if (bytes.length > 0) image.file.write(bytes, 0, bytes.length, image.numbers[number.L1_OFFSET] as number);
}
