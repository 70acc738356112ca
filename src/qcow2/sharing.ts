/**
 * The mapping that the live disk shares with a snapshot, while writers go on: the pause of a checkpoint does not grow
 * with the disk.
 *
 * Taking one (version 3): while the gate is closed, every L2 table of the live disk is only noted as shared (COPIED
 * cleared in the L1 table, a bit in `toShare`), and the header switches to the new snapshot. Then, with the gate open,
 * the refcounts are raised and COPIED is cleared, one L2 table at a time under the mutex; a writer that needs a table of
 * its own before its turn has come does that for it. Until all are done the refcounts in the file are too low: the dirty
 * bit, durable before, makes the next opener count them anew. Nothing falls to 0 by that meanwhile: what a table refers
 * to is let go of only by a copy of the table, which is made after its turn.
 *
 * Deleting one: the header has switched to the table without it. Its references are taken back one L2 table at a time;
 * a crash leaves counts that are too high, no more.
 */
import { setImmediate as giveWay } from 'node:timers/promises';
import { attempt } from './barrier.ts';
import { type ClusterRange, freeInPieces, lowerCounts, releaseClusters, relieve } from './flush.ts';
import type { Image } from './image.ts';
import { number } from './image.ts';
import { COPIED, compressedBytes, compressedOffset, isCompressed, isCopied } from './l2-entry.ts';
import { type L1Table, l2TableAt } from './lookup.ts';
import { maxRefcount } from './refcount-entry.ts';
import { RefcountCursor, refcountOf } from './refcounts.ts';
import { ClusterSet, clusterOf, countedClusters, highUnitOf, type Progress } from './references.ts';

/** Fewer tables than this are shared behind the closed gate: that takes milliseconds, and no refcount is ever too low. */
const MIN_TABLES = 16;

/** Tables looked through between two pauses. */
const TABLES_AT_ONCE = 16;

/** Slices of a table changed between two looks at the cache: one of 64 KiB has no more. */
const SLICES_AT_ONCE = 16;

/**
 * Whether the live mapping can be shared table by table. Version 2 has no dirty bit that others respect. Counts of 16
 * bits and more hold a reference from each of 65,536 snapshots, but not from many compressed clusters in one host
 * cluster, so that there must be none of those. Writers may run: they never make any, so that one look is enough.
 */
export async function canShareLater(image: Image, tables: readonly number[]): Promise<boolean> {
  const { version, refcountOrder } = image.geometry;
  if (version < 3 || refcountOrder < 4) return false;
  const used = tables.filter((host) => host !== 0);
  if (used.length < MIN_TABLES) return false;
  image.hasNoCompressed ||= await holdNoCompressed(image, used);
  return image.hasNoCompressed;
}

async function holdNoCompressed(image: Image, tables: readonly number[]): Promise<boolean> {
  const { clusterBytes, l2EntryBytes } = image.geometry;
  const table = new Uint8Array(clusterBytes);
  for (const [index, host] of tables.entries()) {
    // A table that is not in the file is found by whoever takes the snapshot.
    if (image.file.read(table, 0, clusterBytes, host) < clusterBytes) return false;
    for (let at = 0; at < clusterBytes; at += l2EntryBytes) if (((table[at] as number) & 0x40) !== 0) return false;
    if (index % TABLES_AT_ONCE === TABLES_AT_ONCE - 1) await giveWay();
  }
  return true;
}

/** Note every table of the first `l1Entries` as shared. With the gate closed, everything flushed. */
export function beginSharing(image: Image, l1Entries: number): void {
  const { l1, toShare } = image;
  image.lock();
  try {
    for (let index = 0; index < l1Entries; index++) {
      if (l2TableAt(image, undefined, index) === 0) continue;
      toShare[Math.floor(index / 8)] = (toShare[Math.floor(index / 8)] as number) | (1 << (index % 8));
      l1.setUint32(index * 8, (l1.getUint32(index * 8) & ~COPIED) >>> 0);
      image.markL1Dirty(index);
    }
  } finally {
    image.unlock();
  }
}

/** Give every noted table its turn. Writers go on. @throws FsError EIO: the image is not written any more */
export async function finishSharing(image: Image, l1Entries: number, progress: Progress): Promise<void> {
  for (let index = 0; index < l1Entries; index++) {
    if (!isToShare(image, index)) continue;
    attempt(image, () => {
      image.lock();
      try {
        shareTable(image, index);
      } finally {
        image.unlock();
      }
    });
    progress(index / l1Entries);
    await giveWay();
  }
}

const isToShare = ({ toShare }: Image, l1Index: number): boolean =>
  ((toShare[Math.floor(l1Index / 8)] as number) & (1 << (l1Index % 8))) !== 0;

/**
 * The turn of one table, if it has not come yet: everything in it, and the table itself, has a reference more. With the
 * mutex held. The bit is cleared first: where this fails the counts are wrong, and the image must not be written.
 */
export function shareTable(image: Image, l1Index: number): void {
  if (!isToShare(image, l1Index)) return;
  const { clusterBytes, l2EntryBytes } = image.geometry;
  const host = l2TableAt(image, undefined, l1Index);
  attempt(image, () => {
    const table = readTable(image, host);
    const counts = new RefcountCursor(image);
    const most = maxRefcount(image.geometry.refcountOrder);
    for (const cluster of [...clustersOf(image, table), host / clusterBytes]) {
      const count = counts.get(cluster);
      if (count === 0 || count === most) {
        throw image.fail(`the host cluster ${cluster} is in use, and its refcount is ${count}`);
      }
      counts.set(cluster, count + 1);
    }
    for (let at = 0; at < clusterBytes; at += l2EntryBytes) table[at] = (table[at] as number) & 0x7f;
    image.file.write(table, 0, clusterBytes, host);
    // Shared tables have no changes in the cache.
    image.l2.drop(host, host + clusterBytes);
  });
  const at = Math.floor(l1Index / 8);
  image.toShare[at] = (image.toShare[at] as number) & ~(1 << (l1Index % 8));
}

function readTable(image: Image, host: number): Uint8Array {
  const { clusterBytes } = image.geometry;
  const table = new Uint8Array(clusterBytes);
  if (image.file.read(table, 0, clusterBytes, host) < clusterBytes) {
    throw image.fail(`the L2 table in host cluster ${host / clusterBytes} is not in the file`);
  }
  return table;
}

/** Host clusters that an L2 table refers to, each as often as it does. */
function clustersOf(image: Image, table: Uint8Array): number[] {
  const { clusterBytes, clusterBits, l2EntryBytes } = image.geometry;
  const view = new DataView(table.buffer);
  const highUnit = highUnitOf(clusterBits);
  const clusters: number[] = [];
  for (let at = 0; at < clusterBytes; at += l2EntryBytes) {
    const high = view.getUint32(at);
    const low = view.getUint32(at + 4);
    if ((high | low) === 0) continue;
    if (isCompressed(high)) {
      const host = compressedOffset(high, low, clusterBits);
      const last = Math.floor((host + compressedBytes(high, low, clusterBits) - 1) / clusterBytes);
      for (let cluster = Math.floor(host / clusterBytes); cluster <= last; cluster++) clusters.push(cluster);
      continue;
    }
    const cluster = clusterOf(high, low, clusterBits, highUnit);
    // Cluster 0 is the header: an entry with flags only has no host cluster.
    if (cluster !== 0) clusters.push(cluster);
  }
  return clusters;
}

/** Runs of adjacent clusters. */
function rangesOf(clusters: readonly number[]): ClusterRange[] {
  const ranges: ClusterRange[] = [];
  let first = -1;
  let count = 0;
  for (const cluster of clusters) {
    if (cluster === first + count) {
      count++;
      continue;
    }
    if (count > 0) ranges.push({ first, count });
    first = cluster;
    count = 1;
  }
  if (count > 0) ranges.push({ first, count });
  return ranges;
}

/**
 * Take back what a mapping refers to, and its L1 table, after nothing in the file refers to that any more; what the live
 * mapping alone has left is its own again. Writers go on.
 */
export async function dropMapping(
  image: Image,
  mapping: L1Table,
  l1Clusters: ClusterRange,
  progress: Progress,
): Promise<void> {
  const single = new ClusterSet(countedClusters(image));
  const entries = image.numbers[number.L1_ENTRIES] as number;
  const steps = mapping.entries + entries;
  await dropTables(image, mapping, single, (part) => progress((part * mapping.entries) / steps));
  if (l1Clusters.count > 0) releaseClusters(image, [l1Clusters], single);
  for (let index = 0; index < entries; index++) {
    if (!ownTable(image, index, single)) continue;
    progress((mapping.entries + index) / steps);
    await giveWay();
  }
}

/** Take back the L2 tables of a mapping, and what they refer to. They are in the file as they are, and never change. */
export async function dropTables(
  image: Image,
  mapping: L1Table,
  single: ClusterSet | undefined,
  progress: Progress,
): Promise<void> {
  for (let index = 0; index < mapping.entries; index++) {
    const host = l2TableAt(image, mapping, index);
    if (host === 0) continue;
    const clusters = clustersOf(image, readTable(image, host));
    const freed = lowerCounts(image, rangesOf([...clusters, host / image.geometry.clusterBytes]), single);
    await freeInPieces(image, freed);
    progress(index / mapping.entries);
    await giveWay();
  }
}

/**
 * Set COPIED at an L1 entry, and in its table, for what has come down to one reference. Only what is in `single` is
 * looked at.
 * @returns false if there is nothing to do at this entry
 */
function ownTable(image: Image, l1Index: number, single: ClusterSet): boolean {
  const { clusterBytes, sliceBytes } = image.geometry;
  for (let from = 0; from < clusterBytes; from += SLICES_AT_ONCE * sliceBytes) {
    const to = Math.min(clusterBytes, from + SLICES_AT_ONCE * sliceBytes);
    if (!ownSlices(image, l1Index, { from, to }, single)) return false;
    relieve(image);
  }
  return true;
}

/** The same for the bytes [from, to) of the table. */
function ownSlices(
  image: Image,
  l1Index: number,
  { from, to }: { readonly from: number; readonly to: number },
  single: ClusterSet,
): boolean {
  const { clusterBytes, clusterBits, l2EntryBytes, sliceBytes } = image.geometry;
  const highUnit = highUnitOf(clusterBits);
  const { l1, l2 } = image;
  image.lock();
  try {
    const host = l2TableAt(image, undefined, l1Index);
    if (host === 0) return false;
    if (!isCopied(l1.getUint32(l1Index * 8))) {
      const cluster = host / clusterBytes;
      if (!single.has(cluster) || refcountOf(image, cluster) !== 1) return false;
      l1.setUint32(l1Index * 8, (l1.getUint32(l1Index * 8) | COPIED) >>> 0);
      image.markL1Dirty(l1Index);
    }
    const counts = new RefcountCursor(image);
    for (let start = from; start < to; start += sliceBytes) {
      const position = l2.load(host + start);
      let changed = false;
      for (let at = position; at < position + sliceBytes; at += l2EntryBytes) {
        const high = l2.view.getUint32(at);
        const low = l2.view.getUint32(at + 4);
        // Compressed, its own already, or nothing at all.
        if (high >>> 30 !== 0 || (high | low) === 0) continue;
        const cluster = clusterOf(high, low, clusterBits, highUnit);
        if (cluster === 0 || !single.has(cluster) || counts.get(cluster) !== 1) continue;
        l2.view.setUint32(at, (high | COPIED) >>> 0);
        changed = true;
      }
      if (changed) l2.markDirty(position);
    }
    return true;
  } finally {
    image.unlock();
  }
}
