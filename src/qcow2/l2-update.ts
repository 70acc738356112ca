/** Changing the active mapping, in memory; a flush brings it to the file. With the mutex held. */
import { allocateTable, giveBackTable } from './allocator.ts';
import type { Image } from './image.ts';
import { number } from './image.ts';
import { makeRoomForL1Entry } from './l1-blocks.ts';
import { COPIED, isCopied } from './l2-entry.ts';
import { l2TableAt } from './lookup.ts';
import { shareTable } from './sharing.ts';
import { highHalf, lowHalf } from './units.ts';
import { unlink } from './unlinked.ts';

/**
 * Make the L2 table of an L1 entry exist and belong to the active mapping alone. A new table is complete in the file
 * before the flush that writes the L1 entry.
 * @throws FsError ENOSPC
 */
export function ensureOwnL2(image: Image, l1Index: number): void {
  const { clusterBytes } = image.geometry;
  const old = l2TableAt(image, undefined, l1Index);
  if (old !== 0 && isCopied(image.l1.getUint32(l1Index * 8))) return;
  if (old === 0) makeRoomForL1Entry(image, l1Index);
  else shareTable(image, l1Index);
  const cluster = allocateTable(image, 1);
  const host = cluster * clusterBytes;
  const table = new Uint8Array(clusterBytes);
  try {
    // A shared table has no changes in the cache: they were flushed before it came to be shared.
    if (old !== 0) image.file.read(table, 0, clusterBytes, old);
    image.file.write(table, 0, clusterBytes, host);
  } catch (error) {
    giveBackTable(image, cluster, 1);
    throw error;
  }
  setL1Entry(image, l1Index, (highHalf(host) | COPIED) >>> 0, lowHalf(host));
  if (old !== 0) unlink(image, old / clusterBytes, 1);
}

export function setL1Entry(image: Image, l1Index: number, high: number, low: number): void {
  image.l1.setUint32(l1Index * 8, high);
  image.l1.setUint32(l1Index * 8 + 4, low);
  image.markL1Dirty(l1Index);
}

/** An L2 entry as four words; the last two are the subcluster bitmap of extended entries. One object per thread. */
export interface L2Entry {
  high: number;
  low: number;
  zero: number;
  allocated: number;
}

export const emptyEntry = (): L2Entry => ({ high: 0, low: 0, zero: 0, allocated: 0 });

/**
 * Read the entry of the guest cluster that starts at `guest` into `entry`; all zeros without a table. What a shared table
 * refers to is shared as well, also while the entries do not say so yet (sharing.ts).
 */
export function readEntry(image: Image, guest: number, entry: L2Entry): void {
  const at = entryPosition(image, guest);
  if (at < 0) {
    entry.high = entry.low = entry.zero = entry.allocated = 0;
    return;
  }
  const { view } = image.l2;
  const ownTable = isCopied(image.l1.getUint32(Math.floor(guest / image.geometry.l2SpanBytes) * 8));
  entry.high = ownTable ? view.getUint32(at) : (view.getUint32(at) & ~COPIED) >>> 0;
  entry.low = view.getUint32(at + 4);
  entry.zero = image.geometry.unitsPerCluster === 1 ? 0 : view.getUint32(at + 8);
  entry.allocated = image.geometry.unitsPerCluster === 1 ? 0 : view.getUint32(at + 12);
}

/** Write the entry of the guest cluster that starts at `guest`. Its table must be the image's own. */
export function writeEntry(image: Image, guest: number, entry: L2Entry): void {
  const at = entryPosition(image, guest);
  const { view } = image.l2;
  view.setUint32(at, entry.high);
  view.setUint32(at + 4, entry.low);
  if (image.geometry.unitsPerCluster !== 1) {
    view.setUint32(at + 8, entry.zero);
    view.setUint32(at + 12, entry.allocated);
  }
  image.l2.markDirty(at - (at % image.geometry.sliceBytes));
}

/** Byte position of an entry in the L2 cache, -1 without a table. */
function entryPosition(image: Image, guest: number): number {
  const { l2SpanBytes, clusterBytes, l2EntryBytes, sliceBytes } = image.geometry;
  const l1Index = Math.floor(guest / l2SpanBytes);
  const table = l2TableAt(image, undefined, l1Index);
  if (table === 0) return -1;
  const inTable = ((guest - l1Index * l2SpanBytes) / clusterBytes) * l2EntryBytes;
  const inSlice = inTable % sliceBytes;
  return image.l2.load(table + inTable - inSlice) + inSlice;
}

/** Count clusters that came to hold data of the live disk, or ceased to. */
export function countData(image: Image, clusters: number): void {
  const known = image.numbers[number.DATA_CLUSTERS] as number;
  if (known >= 0) image.numbers[number.DATA_CLUSTERS] = Math.max(0, known + clusters);
}
