/**
 * References of a whole mapping, counted and changed in one ordered sweep: L1 table → L2 tables → refcount blocks, each
 * read once, in the order of the file as far as it goes. QEMU visits each refcount block again for every cluster; on a
 * disk of 1 TiB that is the difference between 10 s and less than one.
 *
 * Needs a still image: gate closed, everything flushed, caches empty. Works on the file directly, in pieces, giving way
 * to other work of the thread in between.
 */
import { setImmediate as giveWay } from 'node:timers/promises';
import { CorruptImage, FsError } from '../errors.ts';
import { countsTooHigh } from './barrier.ts';
import type { Image } from './image.ts';
import { compressedBytes, compressedOffset, hostOf, isCompressed } from './l2-entry.ts';
import { getRefcount, maxRefcount, setRefcount } from './refcount-entry.ts';
import { refcountBlockOf, refcountTableEntries } from './refcounts.ts';
import { hex } from './units.ts';

/** Host clusters counted at a time: one byte each. */
const WINDOW_CLUSTERS = 2 ** 25;
/** Bytes of tables between two pauses. */
const PIECE_BYTES = 4 * 2 ** 20;

/** Told how far a sweep has come, from 0 to 1. */
export type Progress = (fraction: number) => void;

/** Number of references per host cluster of one window. */
class Counts {
  readonly first: number;
  readonly bytes: Uint8Array;
  /** Clusters with more than 255 references (compressed data shares clusters): what exceeds 255. */
  readonly excess = new Map<number, number>();

  constructor(first: number, count: number) {
    this.first = first;
    this.bytes = new Uint8Array(count);
  }

  /** Behind the last cluster of the window. */
  get end(): number {
    return this.first + this.bytes.length;
  }

  add(cluster: number): void {
    const index = cluster - this.first;
    if (index < 0 || index >= this.bytes.length) return;
    const count = this.bytes[index] as number;
    if (count < 255) this.bytes[index] = count + 1;
    else this.excess.set(index, (this.excess.get(index) ?? 0) + 1);
  }

  at(index: number): number {
    const count = this.bytes[index] as number;
    return count < 255 ? count : count + (this.excess.get(index) ?? 0);
  }
}

/** Host offsets of the L2 tables of an L1 table, in its order; 0 where there is none. */
export function l2Tables(l1: DataView, entries: number): number[] {
  const tables: number[] = [];
  for (let index = 0; index < entries; index++) {
    tables.push(hostOf(l1.getUint32(index * 8), l1.getUint32(index * 8 + 4)));
  }
  return tables;
}

/** Runs `visit` on each L2 table, read whole. What `visit` says it changed is written back. */
async function eachTable(
  image: Image,
  tables: readonly number[],
  progress: Progress,
  visit: (table: Uint8Array, view: DataView) => boolean,
): Promise<void> {
  const { clusterBytes } = image.geometry;
  const table = new Uint8Array(clusterBytes);
  const view = new DataView(table.buffer);
  let sincePause = 0;
  for (const [index, host] of tables.entries()) {
    if (host === 0) continue;
    if (host % clusterBytes !== 0 || image.file.read(table, 0, clusterBytes, host) < clusterBytes) {
      throw new CorruptImage(
        `${image.file.path}: the L2 table at ${hex(host)} is not in the file; run vdskfs check on it`,
      );
    }
    if (visit(table, view)) image.file.write(table, 0, clusterBytes, host);
    sincePause += clusterBytes;
    if (sincePause >= PIECE_BYTES) {
      sincePause = 0;
      progress(index / tables.length);
      await giveWay();
    }
  }
}

/** Host cluster of an entry that is not compressed. */
export const clusterOf = (high: number, low: number, clusterBits: number, highUnit: number): number =>
  (high & 0x00ff_ffff) * highUnit + (low >>> clusterBits);

/** Clusters that 2^32 bytes have: what one in the high half stands for. Raised to the power once, not per entry. */
export const highUnitOf = (clusterBits: number): number => 2 ** (32 - clusterBits);

function countTable(image: Image, view: DataView, counts: Counts): void {
  const { clusterBytes, clusterBits, l2EntryBytes, externalData } = image.geometry;
  const highUnit = highUnitOf(clusterBits);
  for (let at = 0; at < clusterBytes; at += l2EntryBytes) {
    const high = view.getUint32(at);
    const low = view.getUint32(at + 4);
    if ((high | low) === 0) continue;
    if (isCompressed(high)) {
      const host = compressedOffset(high, low, clusterBits);
      const last = Math.floor((host + compressedBytes(high, low, clusterBits) - 1) / clusterBytes);
      for (let cluster = Math.floor(host / clusterBytes); cluster <= last; cluster++) counts.add(cluster);
    } else if (!externalData) {
      const cluster = clusterOf(high, low, clusterBits, highUnit);
      // Cluster 0 is the header: an entry with flags only has no host cluster.
      if (cluster !== 0) counts.add(cluster);
    }
  }
}

/** Host clusters that the refcount blocks count. */
export function countedClusters(image: Image): number {
  const { refcountsPerBlock } = image.geometry;
  let blocks = refcountTableEntries(image);
  while (blocks > 0 && refcountBlockOf(image, (blocks - 1) * refcountsPerBlock) === 0) blocks--;
  return blocks * refcountsPerBlock;
}

export interface ReferenceChange {
  /** L2 tables whose references (and which themselves) change; 0: none. */
  readonly tables: readonly number[];
  /** Further clusters that change by as much: of L1 tables. Adjacent ones, as ranges. */
  readonly others: readonly { readonly first: number; readonly count: number }[];
  readonly delta: 1 | -1;
  readonly progress: Progress;
  /** Called with ranges of clusters that nothing refers to any more, before their refcount is written as 0. */
  readonly freed?: (first: number, count: number) => void;
  /** Collects the clusters whose refcount came to be exactly 1. */
  readonly single?: ClusterSet;
}

/**
 * Add `delta` to the refcount of everything that the tables refer to. Raising is checked as a whole first: if any count
 * cannot be held, nothing is changed. Not durable until the caller flushes.
 * @throws FsError ENOTSUP; CorruptImage
 */
export async function changeReferences(image: Image, change: ReferenceChange): Promise<void> {
  const total = countedClusters(image);
  const windows = Math.max(1, Math.ceil(total / WINDOW_CLUSTERS));
  // Only what one window changed can be taken back.
  const passes = change.delta === 1 && windows > 1 ? ['check', 'change'] : ['change'];
  let step = 0;
  for (const pass of passes) {
    for (let window = 0; window < windows; window++) {
      const from = step / (windows * passes.length);
      const span = 1 / (windows * passes.length);
      const first = window * WINDOW_CLUSTERS;
      const counts = new Counts(first, Math.min(WINDOW_CLUSTERS, total - first));
      for (const host of change.tables) {
        if (host !== 0) counts.add(Math.floor(host / image.geometry.clusterBytes));
      }
      for (const range of change.others) {
        for (let cluster = range.first; cluster < range.first + range.count; cluster++) counts.add(cluster);
      }
      await eachTable(
        image,
        change.tables,
        (fraction) => change.progress(from + span * 0.7 * fraction),
        (_table, view) => {
          countTable(image, view, counts);
          return false;
        },
      );
      // Wide counts hardly ever overflow: there, taking back what was raised is enough.
      if (change.delta === 1 && (pass === 'check' || image.geometry.refcountOrder < 4)) {
        await eachCount(image, counts, 1, undefined, counts.end);
      }
      if (pass === 'change') await applyCounts(image, counts, change);
      step++;
    }
  }
}

/** Change the blocks of a window; a block that cannot be written (a full host disk) takes the raised ones back with it. */
async function applyCounts(image: Image, counts: Counts, change: ReferenceChange): Promise<void> {
  const done = { end: counts.first };
  try {
    await eachCount(image, counts, change.delta, change, counts.end, done);
  } catch (error) {
    if (change.delta === -1) throw error;
    await eachCount(image, counts, -1, { ...change, delta: -1 }, done.end);
    throw error;
  }
}

/**
 * Go through the refcount blocks of the window's clusters below `end`; apply the counts, or, without `change`, only see
 * whether they can be.
 * @param done told how far blocks have been written
 */
async function eachCount(
  image: Image,
  counts: Counts,
  delta: 1 | -1,
  change: ReferenceChange | undefined,
  end: number,
  done = { end: 0 },
): Promise<void> {
  const { clusterBytes, refcountsPerBlock, refcountOrder } = image.geometry;
  const block = new Uint8Array(clusterBytes);
  const most = maxRefcount(refcountOrder);
  let sincePause = 0;
  for (let first = counts.first; first < end; first = (Math.floor(first / refcountsPerBlock) + 1) * refcountsPerBlock) {
    const blockEnd = Math.min(end, (Math.floor(first / refcountsPerBlock) + 1) * refcountsPerBlock);
    if (isAllZero(counts.bytes, first - counts.first, blockEnd - counts.first)) continue;
    const host = refcountBlockOf(image, first);
    if (host === 0 || image.file.read(block, 0, clusterBytes, host) < clusterBytes) {
      throw new CorruptImage(
        `${image.file.path}: clusters from ${hex(first * clusterBytes)} on are used but not counted`,
      );
    }
    let freedFrom = -1;
    for (let cluster = first; cluster < blockEnd; cluster++) {
      if (refcountOrder === 4 && freedFrom < 0 && change !== undefined) {
        const index = cluster - counts.first;
        const blockAt = (cluster % refcountsPerBlock) * 2;
        const plain = changePlain(
          block,
          blockAt,
          counts.bytes,
          index,
          blockEnd - cluster,
          delta,
          change.single,
          cluster,
        );
        cluster += plain;
        if (cluster === blockEnd) break;
      }
      const references = counts.at(cluster - counts.first);
      if (references === 0) {
        if (freedFrom >= 0) change?.freed?.(freedFrom, cluster - freedFrom);
        freedFrom = -1;
        continue;
      }
      const index = cluster % refcountsPerBlock;
      const before = getRefcount(block, index, refcountOrder);
      const after = before + delta * references;
      if (before === 0 || after < 0) {
        throw new CorruptImage(
          `${image.file.path}: the cluster at ${hex(cluster * clusterBytes)} has a refcount of ${before} but more references; run vdskfs check --repair all on it`,
        );
      }
      if (after > most) {
        throw new FsError(
          'ENOTSUP',
          `${image.file.path}: a refcount of ${2 ** refcountOrder} bits cannot count to ${after}; delete a checkpoint, or copy the disk to an image with more refcount bits`,
        );
      }
      if (change === undefined) continue;
      setRefcount(block, index, refcountOrder, after);
      if (after === 1) change.single?.add(cluster);
      if (after === 0) {
        if (freedFrom < 0) freedFrom = cluster;
      } else if (freedFrom >= 0) {
        change.freed?.(freedFrom, cluster - freedFrom);
        freedFrom = -1;
      }
    }
    if (freedFrom >= 0) change?.freed?.(freedFrom, blockEnd - freedFrom);
    if (change !== undefined) writeBlock(image, block, host);
    done.end = blockEnd;
    sincePause += clusterBytes;
    if (sincePause >= PIECE_BYTES) {
      sincePause = 0;
      await giveWay();
    }
  }
}

function writeBlock(image: Image, block: Uint8Array, host: number): void {
  try {
    image.file.write(block, 0, block.length, host);
  } catch (error) {
    // Nobody knows which part of it was written.
    countsTooHigh(image);
    throw error;
  }
}

/**
 * The common case in a loop of its own, a tenth of the time: 16-bit counts that neither end at 0 nor are wrong, clusters
 * with fewer than 255 references. Stops at the first entry that is anything else.
 * @returns entries done
 */
function changePlain(
  block: Uint8Array,
  blockAt: number,
  references: Uint8Array,
  index: number,
  length: number,
  delta: 1 | -1,
  single: ClusterSet | undefined,
  cluster: number,
): number {
  for (let done = 0; done < length; done++) {
    const added = references[index + done] as number;
    if (added === 0) continue;
    const at = blockAt + done * 2;
    const before = ((block[at] as number) << 8) | (block[at + 1] as number);
    const after = before + delta * added;
    if (added === 255 || before === 0 || after <= 0 || after > 0xffff) return done;
    block[at] = after >>> 8;
    block[at + 1] = after;
    if (after === 1 && single !== undefined) single.add(cluster + done);
  }
  return length;
}

function isAllZero(bytes: Uint8Array, from: number, to: number): boolean {
  for (let index = from; index < to; index++) if (bytes[index] !== 0) return false;
  return true;
}

/** A set of host clusters: one bit each, for as many as the file has. */
export class ClusterSet {
  readonly #bits: Uint8Array;

  /** @param clusters how many host clusters there can be */
  constructor(clusters: number) {
    this.#bits = new Uint8Array(Math.ceil(clusters / 8));
  }

  add(cluster: number): void {
    const at = Math.floor(cluster / 8);
    this.#bits[at] = (this.#bits[at] ?? 0) | (1 << (cluster % 8));
  }

  has(cluster: number): boolean {
    return ((this.#bits[Math.floor(cluster / 8)] ?? 0) & (1 << (cluster % 8))) !== 0;
  }
}

/**
 * Clear COPIED in every entry of the tables: what they refer to is shared from now on. Compressed entries never have it.
 */
export async function clearCopied(image: Image, tables: readonly number[], progress: Progress): Promise<void> {
  const { clusterBytes, l2EntryBytes } = image.geometry;
  await eachTable(image, tables, progress, (table) => {
    let changed = false;
    for (let at = 0; at < clusterBytes; at += l2EntryBytes) {
      const top = table[at] as number;
      if (top >= 0x80) {
        table[at] = top & 0x7f;
        changed = true;
      }
    }
    return changed;
  });
}

/** Set COPIED in the entries whose cluster is in `single`: they are the active mapping's own again. */
export async function setCopied(
  image: Image,
  tables: readonly number[],
  single: ClusterSet,
  progress: Progress,
): Promise<void> {
  const { clusterBytes, clusterBits, l2EntryBytes } = image.geometry;
  const highUnit = highUnitOf(clusterBits);
  await eachTable(image, tables, progress, (table, view) => {
    let changed = false;
    for (let at = 0; at < clusterBytes; at += l2EntryBytes) {
      const high = view.getUint32(at);
      const low = view.getUint32(at + 4);
      if (high >>> 30 !== 0 || (high | low) === 0) continue;
      if (!single.has(clusterOf(high, low, clusterBits, highUnit))) continue;
      table[at] = (table[at] as number) | 0x80;
      changed = true;
    }
    return changed;
  });
}
