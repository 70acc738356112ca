/** Finding and taking free host clusters. Everything here runs with the mutex held. */
import { FsError } from '../errors.ts';
import { barrier, switchHeader } from './barrier.ts';
import { limits } from './header.ts';
import { writeRefcountTablePosition } from './header-update.ts';
import type { Image } from './image.ts';
import { number } from './image.ts';
import { getRefcount, setRefcount } from './refcount-entry.ts';
import {
  changeRefcount,
  countsPerSlice,
  loadCounts,
  refcountBlockOf,
  refcountTableEntries,
  sliceAt,
} from './refcounts.ts';
import { hex } from './units.ts';
import { unlink } from './unlinked.ts';

/**
 * Take up to `count` adjacent free clusters, at least one, with a refcount of 1 each. The refcounts reach the file before
 * any reference does (the flush writes them first).
 * @throws FsError ENOSPC if the refcount table cannot grow
 */
export function allocate(image: Image, count: number): { readonly first: number; readonly count: number } {
  const first = firstFree(image);
  const { refcountOrder, clusterBytes, refcountsPerBlock } = image.geometry;
  const perSlice = countsPerSlice(image);
  const blockEnd = (Math.floor(first / refcountsPerBlock) + 1) * refcountsPerBlock;
  let cluster = first;
  while (cluster < first + count && cluster < blockEnd) {
    const position = loadCounts(image, cluster);
    const slice = sliceAt(image, position);
    const sliceEnd = Math.min(first + count, (Math.floor(cluster / perSlice) + 1) * perSlice);
    const from = cluster;
    while (cluster < sliceEnd && getRefcount(slice, cluster % perSlice, refcountOrder) === 0) {
      if (image.isMetadata(cluster)) {
        throw image.fail(`the cluster at ${hex(cluster * clusterBytes)} holds metadata but its refcount is 0`);
      }
      setRefcount(slice, cluster % perSlice, refcountOrder, 1);
      cluster++;
    }
    if (cluster > from) image.refcounts.markDirty(position);
    if (cluster < sliceEnd) break;
  }
  image.numbers[number.FREE_HINT] = cluster;
  return { first, count: cluster - first };
}

/**
 * Take exactly `count` adjacent clusters, for a table.
 * @throws FsError ENOSPC
 */
export function allocateTable(image: Image, count: number): number {
  const first = count < image.geometry.refcountsPerBlock ? adjacent(image, count) : pastAllBlocks(image, count);
  const { clusterBytes } = image.geometry;
  image.setMetadata(first, count, true);
  forgetSlices(image, first * clusterBytes, (first + count) * clusterBytes);
  touchFresh(image, first, count);
  return first;
}

/** Give a table's clusters back that nothing refers to yet. */
export function giveBackTable(image: Image, first: number, count: number): void {
  image.setMetadata(first, count, false);
  giveBack(image, first, count);
}

function adjacent(image: Image, count: number): number {
  const { numbers } = image;
  const skipped: { first: number; count: number }[] = [];
  try {
    for (;;) {
      const got = allocate(image, count);
      if (got.count === count) return got.first;
      skipped.push(got);
    }
  } finally {
    // The holes that were too small; giving them back lowers the hint to the first of them again.
    for (const hole of skipped) giveBack(image, hole.first, hole.count);
    if (skipped.length > 0)
      numbers[number.FREE_HINT] = Math.min(numbers[number.FREE_HINT] as number, skipped[0]!.first);
  }
}

/** A table larger than one refcount block counts: in the range behind all blocks, where nothing is used. */
function pastAllBlocks(image: Image, count: number): number {
  const blocks = blocksFor(image, count);
  let block = blocksEnd(image);
  while (block + blocks > refcountTableEntries(image)) {
    growRefcountTable(image);
    // It has put its own blocks behind the old table's range.
    block = blocksEnd(image);
  }
  return createRefcountBlocks(image, block, blocks, count);
}

/** One past the last entry of the refcount table that has a block. */
function blocksEnd(image: Image): number {
  let block = refcountTableEntries(image);
  while (block > 0 && refcountBlockOf(image, (block - 1) * image.geometry.refcountsPerBlock) === 0) block--;
  return block;
}

/** Blocks needed to count themselves and `count` clusters behind them. */
function blocksFor(image: Image, count: number): number {
  let blocks = 1;
  while (blocks * image.geometry.refcountsPerBlock < blocks + count) blocks++;
  return blocks;
}

/** Give clusters back that were taken and never referred to. */
export function giveBack(image: Image, first: number, count: number): void {
  for (let cluster = first; cluster < first + count; cluster++) changeRefcount(image, cluster, -1);
}

/** Whether these host bytes were never written, so that they read as zeros; they count as written from now on. */
export function touchFresh(image: Image, first: number, count: number): boolean {
  const { clusterBytes } = image.geometry;
  const fresh = first * clusterBytes >= (image.numbers[number.FRESH_FROM] as number);
  const end = (first + count) * clusterBytes;
  if (end > (image.numbers[number.FRESH_FROM] as number)) image.numbers[number.FRESH_FROM] = end;
  return fresh;
}

function firstFree(image: Image): number {
  const { refcountOrder, refcountsPerBlock } = image.geometry;
  const perSlice = countsPerSlice(image);
  let cluster = image.numbers[number.FREE_HINT] as number;
  for (;;) {
    const block = Math.floor(cluster / refcountsPerBlock);
    if (block >= refcountTableEntries(image)) growRefcountTable(image);
    if (refcountBlockOf(image, cluster) === 0) createRefcountBlocks(image, block, 1, 0);
    const slice = sliceAt(image, loadCounts(image, cluster));
    const end = (Math.floor(cluster / perSlice) + 1) * perSlice;
    cluster = firstZero(slice, cluster, end, perSlice, refcountOrder);
    if (cluster < end) return cluster;
  }
}

/** First cluster of [cluster, end), all counted in `slice`, whose count is 0; `end` if there is none. */
function firstZero(slice: Uint8Array, cluster: number, end: number, perSlice: number, order: number): number {
  let next = cluster;
  if (order === 4) {
    // A full disk is searched from its start: 16-bit counts get a loop of their own, four times as fast.
    let at = (cluster % perSlice) * 2;
    for (; next < end && ((slice[at] as number) | (slice[at + 1] as number)) !== 0; at += 2) next++;
    return next;
  }
  while (next < end && getRefcount(slice, next % perSlice, order) !== 0) next++;
  return next;
}

/**
 * New refcount blocks stand at the start of the range that they count, all of which is free, and count themselves and
 * the `count` clusters behind them. In version 2 they are durable before the table refers to them: a lost block would
 * make used clusters look free.
 * @returns the first cluster behind the blocks
 */
function createRefcountBlocks(image: Image, block: number, blocks: number, count: number): number {
  const { clusterBytes, refcountsPerBlock } = image.geometry;
  const first = block * refcountsPerBlock;
  writeRefcountBlocks(image, first, blocks, count);
  // Version 3 counts anew after a crash (the dirty bit is durable by now), so that a lost block harms nothing there; and
  // this barrier would wait for all data that was written since the last one, with the mutex held.
  if (image.geometry.version < 3) barrier(image);
  const entries = new Uint8Array(blocks * 8);
  const view = new DataView(entries.buffer);
  for (let index = 0; index < blocks; index++) view.setBigUint64(index * 8, BigInt((first + index) * clusterBytes));
  const at = (image.numbers[number.REFCOUNT_TABLE_OFFSET] as number) + block * 8;
  image.file.write(entries, 0, entries.length, at);
  for (let index = 0; index < blocks; index++) {
    image.refcountTable.setBigUint64((block + index) * 8, view.getBigUint64(index * 8));
  }
  image.setMetadata(first, blocks, true);
  return first + blocks;
}

/**
 * Write `blocks` refcount blocks to the clusters from `first` on, counting themselves and `count` clusters more. They are
 * metadata when the table refers to them: if that fails they are as free as before.
 */
function writeRefcountBlocks(image: Image, first: number, blocks: number, count: number): void {
  const { clusterBytes, refcountsPerBlock, refcountOrder } = image.geometry;
  for (let cluster = first; cluster < first + blocks + count; cluster++) {
    if (image.isMetadata(cluster)) {
      throw image.fail(`the cluster at ${hex(cluster * clusterBytes)} holds metadata but has no refcount`);
    }
  }
  const bytes = new Uint8Array(clusterBytes);
  for (let index = 0; index < blocks; index++) {
    bytes.fill(0);
    const used = Math.min(refcountsPerBlock, blocks + count - index * refcountsPerBlock);
    for (let entry = 0; entry < used; entry++) setRefcount(bytes, entry, refcountOrder, 1);
    image.file.write(bytes, 0, clusterBytes, (first + index) * clusterBytes);
  }
  forgetSlices(image, first * clusterBytes, (first + blocks) * clusterBytes);
  touchFresh(image, first, blocks);
}

/** These host bytes get another use than the caches know. */
function forgetSlices(image: Image, from: number, to: number): void {
  image.l2.drop(from, to);
  image.refcounts.drop(from, to);
}

/**
 * A larger refcount table, at the start of the range that the old one cannot count: first the blocks that count the new
 * structures, then the table. Complete and durable before the one header write that switches to it.
 */
function growRefcountTable(image: Image): void {
  const { geometry, numbers, refcountTable } = image;
  const { clusterBytes, refcountsPerBlock } = geometry;
  const oldEntries = refcountTableEntries(image);
  const oldClusters = numbers[number.REFCOUNT_TABLE_CLUSTERS] as number;
  const oldOffset = numbers[number.REFCOUNT_TABLE_OFFSET] as number;

  let tableClusters = Math.ceil(oldClusters * 1.5);
  let blocks = 1;
  do {
    tableClusters++;
    blocks = blocksFor(image, tableClusters);
  } while ((tableClusters * clusterBytes) / 8 < oldEntries + blocks);
  if (tableClusters * clusterBytes > limits.REFCOUNT_TABLE_BYTES) {
    throw new FsError('ENOSPC', `${image.file.path}: the refcount table cannot grow beyond 8 MiB; use larger clusters`);
  }

  const first = oldEntries * refcountsPerBlock;
  const tableCluster = first + blocks;
  writeRefcountBlocks(image, first, blocks, tableClusters);
  const table = new Uint8Array(tableClusters * clusterBytes);
  table.set(new Uint8Array(refcountTable.buffer, refcountTable.byteOffset, oldEntries * 8));
  const view = new DataView(table.buffer);
  for (let index = 0; index < blocks; index++) {
    view.setBigUint64((oldEntries + index) * 8, BigInt((first + index) * clusterBytes));
  }
  image.file.write(table, 0, table.length, tableCluster * clusterBytes);
  barrier(image);
  switchHeader(image, () => writeRefcountTablePosition(image.file, tableCluster * clusterBytes, tableClusters));

  new Uint8Array(refcountTable.buffer, refcountTable.byteOffset).set(table);
  numbers[number.REFCOUNT_TABLE_OFFSET] = tableCluster * clusterBytes;
  numbers[number.REFCOUNT_TABLE_CLUSTERS] = tableClusters;
  image.setMetadata(first, blocks + tableClusters, true);
  forgetSlices(image, tableCluster * clusterBytes, (tableCluster + tableClusters) * clusterBytes);
  touchFresh(image, tableCluster, tableClusters);
  unlink(image, oldOffset / clusterBytes, oldClusters);
}
