/**
 * State of a guest on its way into a snapshot (qcow2 specification, "Snapshots": the L1 entries past the end of the
 * disk). An area has a mapping of its own, that nothing in the file refers to until `publishSnapshot` puts it behind the
 * snapshot's disk: so a crash leaves nothing of it, and the clusters are linked before they are written. Several threads
 * write at once; the memory of a guest goes straight to its place.
 */
import { type Errno, FsError } from '../errors.ts';
import { allocate, allocateTable, giveBack, giveBackTable, touchFresh } from './allocator.ts';
import { countsTooHigh, isFailed } from './barrier.ts';
import { flush, relieve, waitForEarlierReads } from './flush.ts';
import { limits } from './header.ts';
import { type Image, word } from './image.ts';
import { ALL_ZEROES, hostOf } from './l2-entry.ts';
import { type L1Table, l2TableAt } from './lookup.ts';
import { readRange } from './read.ts';
import { dropTables } from './sharing.ts';
import { highHalf, lowHalf } from './units.ts';
import { unlink } from './unlinked.ts';
import { stepEnd } from './write.ts';

/** What threads share of an area beside its L1 table, indexes into `StateArea.numbers`; guarded by the image's mutex. */
const number = {
  /** Highest byte written so far, or the size that was set. */
  SIZE: 0,
  /** Index into `failures` of the first write that failed. */
  FAILURE: 1,
  /** 1: nothing is written any more. */
  ENDED: 2,
  /** Clusters that hold data. */
  CLUSTERS: 3,
  COUNT: 4,
} as const;

const failures: readonly (Errno | undefined)[] = [undefined, 'EIO', 'ENOSPC', 'EFBIG'];

/** An area as plain data that can be posted to another thread. */
export interface SharedStateArea {
  readonly l1: SharedArrayBuffer;
  readonly numbers: SharedArrayBuffer;
  /** Bytes in front of the first one that `writeState` writes; a multiple of the cluster size. */
  readonly base: number;
}

/** One thread's object over an area. */
export class StateArea {
  readonly shared: SharedStateArea;
  readonly table: L1Table;
  readonly numbers: Float64Array;

  constructor(shared: SharedStateArea) {
    this.shared = shared;
    this.table = { view: new DataView(shared.l1), entries: shared.l1.byteLength / 8, diskBytes: 0 };
    this.numbers = new Float64Array(shared.numbers);
  }

  /** @param l1Entries of the disk that the area will lie behind: both share the largest table there can be */
  static create(image: Image, l1Entries: number, base: number): StateArea {
    const most = Math.min(limits.L1_BYTES / 8 - l1Entries, Math.floor(2 ** 52 / image.geometry.l2SpanBytes));
    // Pages that nobody touches cost no memory.
    const l1 = new SharedArrayBuffer(Math.max(0, most) * 8);
    return new StateArea({ l1, numbers: new SharedArrayBuffer(number.COUNT * 8), base });
  }

  size(): number {
    return this.numbers[number.SIZE] as number;
  }

  /** What it takes in the file, tables left out. */
  allocatedBytes(image: Image): number {
    return (this.numbers[number.CLUSTERS] as number) * image.geometry.clusterBytes;
  }

  /** Why a write failed: what the guest has saved is not whole then. */
  failure(): Errno | undefined {
    return failures[this.numbers[number.FAILURE] as number];
  }
}

/**
 * Write `source[at, at + length)` at `offset`, behind the end as well. What is all zeros, where nothing was written
 * before, takes no space.
 * @throws FsError ENOSPC, EFBIG, EIO, and then the area stays marked as failed; EROFS after `endState`
 */
export function writeState(
  image: Image,
  area: StateArea,
  source: Uint8Array,
  at: number,
  length: number,
  offset: number,
): void {
  const { base } = area.shared;
  inSteps(image, area, base + offset, length, (from, to) => {
    checkGoing(image, area);
    putPieces(image, area, source, at + (from - base - offset), to - from, from);
  });
  image.lock();
  if (offset + length > area.size()) area.numbers[number.SIZE] = offset + length;
  image.unlock();
}

/** As `writeState`, for whoever has ended the area; `guest` counts from the area's start, in front of the base. */
export function putState(image: Image, area: StateArea, source: Uint8Array, guest: number): void {
  inSteps(image, area, guest, source.length, (from, to) => {
    putPieces(image, area, source, from - guest, to - from, from);
  });
}

/** The range, inside the size, reads as zeros; its clusters are freed. @throws FsError as `writeState` */
export function zeroState(image: Image, area: StateArea, offset: number, length: number): void {
  inSteps(image, area, area.shared.base + offset, length, (from, to) => {
    checkGoing(image, area);
    clear(image, area, from, to - from);
  });
}

/** Truncate, or grow by zeros. @throws FsError as `writeState` */
export function setStateSize(image: Image, area: StateArea, bytes: number): void {
  const { clusterBytes } = image.geometry;
  checkGoing(image, area);
  // Whole clusters, so that none is left behind the end; the base is a multiple of their size.
  zeroState(image, area, bytes, Math.max(0, Math.ceil(area.size() / clusterBytes) * clusterBytes - bytes));
  image.lock();
  area.numbers[number.SIZE] = bytes;
  image.unlock();
}

/** Fill `target[at, at + length)` from `offset`; the range lies inside the size. */
export function readState(
  image: Image,
  area: StateArea,
  target: Uint8Array,
  at: number,
  length: number,
  offset: number,
): void {
  readRange(image, area.table, target, at, length, area.shared.base + offset);
}

/** Nothing is written to the area any more, by any thread, when this returns. On the main thread. */
export function endState(image: Image, area: StateArea): void {
  image.lock();
  area.numbers[number.ENDED] = 1;
  const epoch = Atomics.add(image.words, word.EPOCH, 1);
  image.unlock();
  waitForEarlierReads(image, epoch);
}

/**
 * The area's L1 table for its first `bytes`, after `endState`. Tables behind them, of what was truncated, are let go of.
 */
export function trimState(image: Image, { table }: StateArea, bytes: number): Uint8Array {
  const entries = Math.ceil(bytes / image.geometry.l2SpanBytes);
  const used = usedEntries(table);
  image.lock();
  try {
    for (let index = entries; index < used; index++) {
      const host = l2TableAt(image, table, index);
      if (host !== 0) unlink(image, host / image.geometry.clusterBytes, 1);
      table.view.setBigUint64(index * 8, 0n);
    }
  } finally {
    image.unlock();
  }
  return new Uint8Array(table.view.buffer, table.view.byteOffset, entries * 8);
}

/** Free everything in areas, after `endState`. A failure leaves clusters counted that nothing uses, no more. */
export async function dropStates(image: Image, areas: readonly StateArea[]): Promise<void> {
  // The mark of the session stays then: the next opener counts anew.
  if (areas.length === 0 || isFailed(image)) return;
  try {
    flush(image);
    for (const { table } of areas) {
      await dropTables(image, { ...table, entries: usedEntries(table) }, undefined, () => {});
    }
    flush(image);
  } catch (error) {
    countsTooHigh(image);
    if (!(error instanceof FsError)) throw error;
  }
}

/** L1 entries of the area up to its last table. */
function usedEntries({ view, entries }: L1Table): number {
  const words = new Uint32Array(view.buffer, view.byteOffset, entries * 2);
  let used = words.length;
  while (used > 0 && words[used - 1] === 0) used--;
  return Math.ceil(used / 2);
}

/**
 * Run `action` for one part of the range after another, none larger than the caches can take (`stepEnd`); a failure marks
 * the area.
 */
function inSteps(
  image: Image,
  area: StateArea,
  guest: number,
  length: number,
  action: (from: number, to: number) => void,
): void {
  const end = guest + length;
  let from = guest;
  try {
    const capacity = area.table.entries * image.geometry.l2SpanBytes;
    if (end > capacity) {
      throw new FsError(
        'EFBIG',
        `${image.file.path} has room for ${capacity} bytes of guest state, ${end} are too many`,
      );
    }
    while (from < end) {
      const to = Math.min(end, stepEnd(image, from));
      image.checkUsable();
      const entered = image.enter();
      try {
        action(from, to);
      } finally {
        image.leave(entered);
      }
      relieve(image);
      from = to;
    }
  } catch (error) {
    if (area.numbers[number.FAILURE] === 0) {
      const index = error instanceof FsError ? failures.indexOf(error.errno) : -1;
      area.numbers[number.FAILURE] = index > 0 ? index : failures.indexOf('EIO');
    }
    throw error;
  }
}

/** Under the mutex: who comes before `endState` is waited for, who comes after it is refused. */
function checkGoing(image: Image, area: StateArea): void {
  image.lock();
  const ended = area.numbers[number.ENDED] === 1;
  image.unlock();
  if (ended) {
    throw new FsError('EROFS', `${image.file.path}: this state belongs to a checkpoint that is complete, or given up`);
  }
}

/** All zeros; at least a cluster. One per thread. */
let zeros = Buffer.alloc(0);

function zerosFor(length: number): Buffer {
  if (zeros.length < length) zeros = Buffer.alloc(length);
  return zeros;
}

function putPieces(image: Image, area: StateArea, source: Uint8Array, at: number, length: number, guest: number): void {
  let done = 0;
  while (done < length) {
    const blank = run(image, source, at + done, length - done, guest + done, true);
    // Zeros go where clusters are already; elsewhere there is nothing to do.
    if (blank > 0) clear(image, area, guest + done, blank);
    done += blank;
    const data = run(image, source, at + done, length - done, guest + done, false);
    for (const end = done + data; done < end; ) done += put(image, area, source, at + done, end - done, guest + done);
  }
}

/** Bytes from `guest` on, in pieces that end where a cluster does, that are all zero in `source`, or that are not. */
function run(image: Image, source: Uint8Array, at: number, length: number, guest: number, zero: boolean): number {
  const { clusterBytes } = image.geometry;
  const blank = zerosFor(clusterBytes);
  let done = 0;
  while (done < length) {
    const piece = Math.min(length - done, clusterBytes - ((guest + done) % clusterBytes));
    if ((blank.compare(source, at + done, at + done + piece, 0, piece) === 0) !== zero) break;
    done += piece;
  }
  return done;
}

/** Write what goes to one place in the file; returns the bytes taken from `source`. */
function put(image: Image, area: StateArea, source: Uint8Array, at: number, length: number, guest: number): number {
  let taken = 0;
  image.lock();
  try {
    taken = place(image, area, guest, length);
  } finally {
    image.unlock();
  }
  image.data.write(source, at, taken, image.extent.host);
  return taken;
}

/**
 * Bytes from `guest` on that have one place in the file, `image.extent.host`, made where there was none. With the mutex
 * held.
 */
function place(image: Image, { table, numbers }: StateArea, guest: number, length: number): number {
  const { clusterBytes, l2SpanBytes } = image.geometry;
  const l1Index = Math.floor(guest / l2SpanBytes);
  const end = Math.min(guest + length, (l1Index + 1) * l2SpanBytes);
  ensureTable(image, table, l1Index);
  const first = guest - (guest % clusterBytes);
  let host = hostAt(image, table, first);
  let next = first + clusterBytes;
  if (host !== 0) {
    while (next < end && hostAt(image, table, next) === host + (next - first)) next += clusterBytes;
    image.checkNoOverlap(host, next - first);
  } else {
    while (next < end && hostAt(image, table, next) === 0) next += clusterBytes;
    const got = allocate(image, (next - first) / clusterBytes);
    host = got.first * clusterBytes;
    next = first + got.count * clusterBytes;
    if (!touchFresh(image, got.first, got.count)) blankEnds(image, got, guest - first, Math.max(0, next - end));
    for (let at = first; at < next; at += clusterBytes) setHost(image, table, at, host + (at - first));
    numbers[number.CLUSTERS] = (numbers[number.CLUSTERS] as number) + got.count;
  }
  image.extent.host = host + (guest - first);
  return Math.min(next, end) - guest;
}

/**
 * The clusters held something else before: what a write does not cover of the first and the last one must not show that.
 * Under the mutex, since another thread may write there as soon as they are linked.
 */
function blankEnds(image: Image, { first, count }: { first: number; count: number }, head: number, tail: number): void {
  const { clusterBytes } = image.geometry;
  try {
    if (head > 0) image.data.write(zerosFor(head), 0, head, first * clusterBytes);
    if (tail > 0) image.data.write(zerosFor(tail), 0, tail, (first + count) * clusterBytes - tail);
  } catch (error) {
    giveBack(image, first, count);
    throw error;
  }
}

/** Free the clusters that the range covers, and write zeros to those that it touches. */
function clear(image: Image, area: StateArea, guest: number, length: number): void {
  const { clusterBytes, l2SpanBytes } = image.geometry;
  const { table } = area;
  const end = guest + length;
  image.lock();
  try {
    let at = guest - (guest % clusterBytes);
    while (at < end) {
      const l1Index = Math.floor(at / l2SpanBytes);
      if (l2TableAt(image, table, l1Index) === 0) {
        at = (l1Index + 1) * l2SpanBytes;
        continue;
      }
      const host = hostAt(image, table, at);
      if (host !== 0) {
        const head = Math.max(0, guest - at);
        const piece = Math.min(end - at, clusterBytes) - head;
        if (piece === clusterBytes) {
          setHost(image, table, at, 0);
          area.numbers[number.CLUSTERS] = (area.numbers[number.CLUSTERS] as number) - 1;
          unlink(image, host / clusterBytes, 1);
        } else {
          image.data.write(zerosFor(piece), 0, piece, host + head);
        }
      }
      at += clusterBytes;
    }
  } finally {
    image.unlock();
  }
}

function ensureTable(image: Image, table: L1Table, l1Index: number): void {
  if (l2TableAt(image, table, l1Index) !== 0) return;
  const { clusterBytes } = image.geometry;
  const cluster = allocateTable(image, 1);
  try {
    image.file.write(zerosFor(clusterBytes), 0, clusterBytes, cluster * clusterBytes);
  } catch (error) {
    giveBackTable(image, cluster, 1);
    throw error;
  }
  table.view.setUint32(l1Index * 8, highHalf(cluster * clusterBytes));
  table.view.setUint32(l1Index * 8 + 4, lowHalf(cluster * clusterBytes));
}

/** Byte position in the L2 cache of the entry for the cluster at `guest`, whose table exists. */
function entryPosition(image: Image, table: L1Table, guest: number): number {
  const { l2SpanBytes, clusterBytes, l2EntryBytes, sliceBytes } = image.geometry;
  const l1Index = Math.floor(guest / l2SpanBytes);
  const inTable = ((guest - l1Index * l2SpanBytes) / clusterBytes) * l2EntryBytes;
  const inSlice = inTable % sliceBytes;
  return image.l2.load(l2TableAt(image, table, l1Index) + inTable - inSlice) + inSlice;
}

/** Host offset of the cluster at `guest`, 0 if it has none; its table exists. */
function hostAt(image: Image, table: L1Table, guest: number): number {
  const position = entryPosition(image, table, guest);
  return hostOf(image.l2.view.getUint32(position), image.l2.view.getUint32(position + 4));
}

function setHost(image: Image, table: L1Table, guest: number, host: number): void {
  const { sliceBytes, unitsPerCluster } = image.geometry;
  const position = entryPosition(image, table, guest);
  const { view } = image.l2;
  view.setUint32(position, highHalf(host));
  view.setUint32(position + 4, lowHalf(host));
  // Subclusters: zero bits above, allocated bits below; the whole cluster is there, or nothing.
  if (unitsPerCluster !== 1) {
    view.setUint32(position + 8, 0);
    view.setUint32(position + 12, host === 0 ? 0 : 0xffff_ffff);
  }
  image.l2.markDirty(position - (position % sliceBytes));
}

/**
 * Before the area is published: QEMU reads what is not allocated from the backing file, which may be longer than the
 * disk. Up to `backedBytes` of the area every cluster gets an entry of its own. On the main thread, after `endState`.
 */
export function coverBacking(image: Image, area: StateArea, backedBytes: number): void {
  const { clusterBytes, version, unitsPerCluster, sliceBytes } = image.geometry;
  const { view } = image.l2;
  for (let guest = 0; guest < backedBytes; guest += clusterBytes) {
    image.lock();
    try {
      ensureTable(image, area.table, Math.floor(guest / image.geometry.l2SpanBytes));
      if (hostAt(image, area.table, guest) !== 0) continue;
      if (version < 3) {
        place(image, area, guest, clusterBytes);
        image.data.write(zerosFor(clusterBytes), 0, clusterBytes, image.extent.host);
        continue;
      }
      const position = entryPosition(image, area.table, guest);
      if (unitsPerCluster === 1) view.setUint32(position + 4, ALL_ZEROES);
      else view.setUint32(position + 8, 0xffff_ffff);
      image.l2.markDirty(position - (position % sliceBytes));
    } finally {
      image.unlock();
    }
    relieve(image);
  }
}
