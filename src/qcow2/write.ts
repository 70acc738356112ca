/**
 * Writing guest bytes. Where the cluster is the image's own they are written in place; else to fresh clusters, which are
 * linked after their bytes have been written. Data moves outside the mutex.
 */
import { FsError } from '../errors.ts';
import { allocate, giveBack, touchFresh } from './allocator.ts';
import { countsTooHigh } from './barrier.ts';
import { beforeData, beforeMetadata } from './first-write.ts';
import { relieve, relieveFull } from './flush.ts';
import { enterWrite, leaveWrite } from './gate.ts';
import type { Image } from './image.ts';
import { UNLINKED_CAPACITY, word } from './image.ts';
import type { Kind } from './l2-entry.ts';
import {
  COPIED,
  compressedBytes,
  compressedOffset,
  hasHost,
  hostOf,
  isCompressed,
  isCopied,
  kind,
  kindOf,
  subclusterKind,
} from './l2-entry.ts';
import { countData, emptyEntry, ensureOwnL2, type L2Entry, readEntry, writeEntry } from './l2-update.ts';
import { lookup } from './lookup.ts';
import { readRange } from './read.ts';
import { highHalf, lowHalf } from './units.ts';
import { unlink } from './unlinked.ts';
import { noteWritten } from './written-map.ts';

/** Clusters allocated in one step at most. */
const STEP_BYTES = 2 * 2 ** 20;

/**
 * Write `source[at, at + length)` at `guest`. The range must lie inside the disk.
 * @returns false when the gate is closed: ask again, writing a part of it twice does no harm
 * @throws FsError ENOSPC, EIO; what was written before the failing piece stays
 */
export function writeRange(image: Image, source: Uint8Array, at: number, length: number, guest: number): boolean {
  const end = guest + length;
  let from = guest;
  while (from < end) {
    const to = Math.min(end, stepEnd(image, from));
    relieveFull(image);
    if (!beginWrite(image)) return false;
    try {
      writePieces(image, source, at + (from - guest), to - from, from);
    } finally {
      endWrite(image, from, to);
    }
    from = to;
  }
  return true;
}

/**
 * How far a change that begins at `guest` may go before memory is relieved: all threads together must not fill more than
 * a quarter of the L2 cache and of the list of unlinked clusters. More than any request, but for tiny clusters or caches.
 */
export function stepEnd(image: Image, guest: number): number {
  const { clusterBytes, sliceBytes, l2EntryBytes } = image.geometry;
  const threads = image.words[word.THREADS] as number;
  const slices = Math.max(1, Math.floor(image.l2.slots / (4 * threads)));
  const clusters = Math.min(
    (slices * sliceBytes) / l2EntryBytes,
    Math.max(1, Math.floor(UNLINKED_CAPACITY / (4 * threads))),
  );
  return guest - (guest % clusterBytes) + clusters * clusterBytes;
}

/**
 * Run `action`, which changes guest bytes of [guest, end), as one of the image's writers; afterwards flush if much has
 * gathered in memory. For work that no client waits for.
 * @returns false when the gate is closed
 */
export function asWriter(image: Image, guest: number, end: number, action: () => void): boolean {
  // On a full host the flush of the last one may have failed.
  relieveFull(image);
  if (!beginWrite(image)) return false;
  try {
    action();
  } finally {
    endWrite(image, guest, end);
  }
  relieve(image);
  return true;
}

/**
 * This thread becomes one of the image's writers, until `endWrite`. Two functions and no callback, since the data path
 * allocates nothing.
 * @returns false when the gate is closed
 */
export function beginWrite(image: Image): boolean {
  image.checkUsable();
  if (!enterWrite(image)) return false;
  image.enter();
  try {
    beforeData(image);
  } catch (error) {
    endWrite(image, 0, 0);
    throw error;
  }
  return true;
}

/** The change of [guest, end) has ended, well or not. */
export function endWrite(image: Image, guest: number, end: number): void {
  noteWritten(image, guest, end);
  // Writers do not nest: what `beginWrite` entered was the outermost operation.
  image.leave(true);
  leaveWrite(image);
}

/** The write proper, for callers that are writers already. */
export function writePieces(image: Image, source: Uint8Array, at: number, length: number, guest: number): void {
  const { extent, data } = image;
  let from = at;
  let to = guest;
  const end = guest + length;
  while (to < end) {
    image.lock();
    let host = 0;
    let run = 0;
    try {
      run = ownRun(image, to, end - to);
      host = extent.host;
      if (run > 0) image.checkNoOverlap(host, run);
    } finally {
      image.unlock();
    }
    if (run > 0) data.write(source, from, run, host);
    else run = writeFresh(image, source, from, end - to, to);
    from += run;
    to += run;
  }
}

/**
 * Bytes from `guest` on that can be overwritten in place: allocated, adjacent in the file, and the image's own (COPIED).
 * Their host offset is `image.extent.host`. With the mutex held.
 */
function ownRun(image: Image, guest: number, length: number): number {
  const { extent, geometry } = image;
  lookup(image, undefined, guest, length);
  if (extent.kind !== kind.DATA) return 0;
  const end = guest + extent.length;
  const entry = ownRunEntry;
  let position = guest - (guest % geometry.clusterBytes);
  while (position < end) {
    readEntry(image, position, entry);
    if (!isCopied(entry.high)) break;
    position += geometry.clusterBytes;
  }
  return Math.max(0, Math.min(position, end) - guest);
}

const ownRunEntry = emptyEntry();

/** A piece on its way to clusters that are not linked yet. */
interface Plan {
  /** Guest bytes [start, end): whole clusters. */
  start: number;
  end: number;
  /** Host offset of the first cluster; the others follow it. */
  host: number;
  /** Allocated now: must be given back if the write fails, and replaces what the entries held before. */
  fresh: boolean;
  /** The host bytes read as zeros. */
  blank: boolean;
}

/**
 * Write what fits into one run of clusters that need linking; returns the bytes taken from `source`. The clusters are in
 * the in-flight table meanwhile, so that no other write touches them.
 */
function writeFresh(
  image: Image,
  source: Uint8Array,
  at: number,
  length: number,
  guest: number,
  claimable: Claimable = notOwn,
): number {
  const plan = claim(image, guest, length, claimable);
  if (plan === undefined) return 0;
  const taken = Math.min(length, plan.end - guest);
  try {
    fillOrGiveBack(image, plan, source, at, taken, guest);
    image.lock();
    try {
      link(image, plan, guest, taken);
    } catch (error) {
      countsTooHigh(image);
      throw error;
    } finally {
      image.unlock();
    }
  } finally {
    release(image);
  }
  return taken;
}

/** A full host disk must not cost clusters: those that could not be filled are free again. */
function fillOrGiveBack(image: Image, plan: Plan, source: Uint8Array, at: number, length: number, guest: number): void {
  try {
    fill(image, plan, source, at, length, guest);
  } catch (error) {
    if (plan.fresh && !image.geometry.externalData) {
      const { clusterBytes } = image.geometry;
      image.lock();
      try {
        giveBack(image, plan.host / clusterBytes, (plan.end - plan.start) / clusterBytes);
      } finally {
        image.unlock();
      }
    }
    throw error;
  }
}

/** Whether the guest range may be written to clusters that are linked anew. With the mutex held. */
type Claimable = (image: Image, guest: number, length: number) => boolean;

const notOwn: Claimable = (image, guest) => ownRun(image, guest, 1) === 0;

const isUnallocated: Claimable = (image, guest, length) => {
  lookup(image, undefined, guest, length);
  return image.extent.kind === kind.UNALLOCATED && image.extent.length === length;
};

/**
 * Write `source[at, at + length)` at `guest`, but only as far as the image has nothing of its own there, which is decided
 * with the range claimed: no write that is under way is undone. For callers that are writers. `guest` is at the start of
 * a unit, the end at one or at the disk's.
 * @returns bytes from `guest` on that are dealt with, written or not; at least 1
 */
export function writeUnallocated(image: Image, source: Uint8Array, at: number, length: number, guest: number): number {
  const { extent } = image;
  for (;;) {
    image.lock();
    try {
      lookup(image, undefined, guest, length);
    } finally {
      image.unlock();
    }
    if (extent.kind !== kind.UNALLOCATED) return extent.length;
    const done = writeFresh(image, source, at, extent.length, guest, isUnallocated);
    if (done > 0) return done;
  }
}

/**
 * Decide where the clusters from `guest` on go, and put them in the in-flight table.
 * @returns undefined after waiting for another write in the same place: look again
 */
function claim(image: Image, guest: number, length: number, claimable: Claimable): Plan | undefined {
  const { geometry, inFlight, words } = image;
  const { clusterBytes, l2SpanBytes } = geometry;
  const start = guest - (guest % clusterBytes);
  let changes = 0;
  image.lock();
  try {
    const spanEnd = (Math.floor(guest / l2SpanBytes) + 1) * l2SpanBytes;
    const wanted = Math.min(
      start + Math.max(clusterBytes, STEP_BYTES),
      spanEnd,
      Math.ceil((guest + length) / clusterBytes) * clusterBytes,
    );
    const end = beforeOthers(image, start, wanted);
    changes = Atomics.load(words, word.IN_FLIGHT_CHANGES);
    if (end > start) {
      // What was looked up before may have been linked meanwhile by the write that was waited for.
      if (!claimable(image, guest, Math.min(guest + length, end) - guest)) return undefined;
      beforeMetadata(image);
      ensureOwnL2(image, Math.floor(guest / l2SpanBytes));
      const plan = choose(image, start, end);
      inFlight[image.thread * 2] = plan.start;
      inFlight[image.thread * 2 + 1] = plan.end;
      return plan;
    }
  } finally {
    image.unlock();
  }
  Atomics.wait(words, word.IN_FLIGHT_CHANGES, changes);
  return undefined;
}

/** Where [start, end) first meets another thread's claim; `start` if it begins inside one. With the mutex held. */
export function beforeOthers(image: Image, start: number, end: number): number {
  let free = end;
  for (let thread = 0; thread < (image.words[word.THREADS] as number); thread++) {
    const from = image.inFlight[thread * 2] as number;
    const to = image.inFlight[thread * 2 + 1] as number;
    if (thread !== image.thread && from < free && to > start) free = Math.max(start, from);
  }
  return free;
}

function release(image: Image): void {
  image.lock();
  image.inFlight[image.thread * 2] = 0;
  image.inFlight[image.thread * 2 + 1] = 0;
  Atomics.add(image.words, word.IN_FLIGHT_CHANGES, 1);
  image.unlock();
  Atomics.notify(image.words, word.IN_FLIGHT_CHANGES);
}

/** The host cluster of an entry may be used as it is: it belongs to the image alone. */
const hasOwnCluster = (image: Image, entry: L2Entry): boolean =>
  !isCompressed(entry.high) && isCopied(entry.high) && hasHost(entry.high, entry.low, image.geometry.externalData);

/** Use the preallocated clusters that are there, or take new ones. With the mutex held. */
function choose(image: Image, start: number, end: number): Plan {
  const { clusterBytes, externalData } = image.geometry;
  const entry = chooseEntry;
  readEntry(image, start, entry);
  if (hasOwnCluster(image, entry)) {
    const host = hostOf(entry.high, entry.low);
    let position = start + clusterBytes;
    for (; position < end; position += clusterBytes) {
      readEntry(image, position, entry);
      if (!hasOwnCluster(image, entry) || hostOf(entry.high, entry.low) !== host + (position - start)) break;
      if (isWhole(image, entry)) break;
    }
    image.checkNoOverlap(host, position - start);
    return { start, end: position, host, fresh: false, blank: false };
  }
  let position = start + clusterBytes;
  for (; position < end; position += clusterBytes) {
    readEntry(image, position, entry);
    if (hasOwnCluster(image, entry)) break;
  }
  if (externalData) return { start, end: position, host: start, fresh: true, blank: false };
  const got = allocate(image, (position - start) / clusterBytes);
  const blank = touchFresh(image, got.first, got.count);
  return { start, end: start + got.count * clusterBytes, host: got.first * clusterBytes, fresh: true, blank };
}

const chooseEntry = emptyEntry();

/** All of the cluster holds data: nothing to link. */
const isWhole = (image: Image, entry: L2Entry): boolean =>
  image.geometry.unitsPerCluster === 1 ? (entry.low & 1) === 0 : entry.allocated === 0xffff_ffff;

/**
 * Write the guest's bytes, and around them what the first and the last cluster held before, so that every unit that will
 * be linked is complete.
 */
function fill(image: Image, plan: Plan, source: Uint8Array, at: number, length: number, guest: number): void {
  const { data } = image;
  const end = guest + length;
  const needed = neededAround(image, plan, guest, end);
  const head = guest - needed.from;
  const tail = needed.to - end;
  const skipHead = head === 0 || (plan.blank && readsAsZeros(image, needed.from, head));
  const skipTail = tail === 0 || (plan.blank && readsAsZeros(image, end, tail));
  const hostOfGuest = plan.host + (guest - plan.start);
  const { scratch } = image;
  if (skipHead && skipTail) {
    data.write(source, at, length, hostOfGuest);
    return;
  }
  const before = skipHead ? 0 : head;
  const after = skipTail ? 0 : tail;
  if (before + length + after <= scratch.length) {
    readOld(image, scratch, 0, before, guest - before);
    scratch.set(source.subarray(at, at + length), before);
    readOld(image, scratch, before + length, after, end);
    data.write(scratch, 0, before + length + after, hostOfGuest - before);
    return;
  }
  readOld(image, scratch, 0, before, guest - before);
  if (before > 0) data.write(scratch, 0, before, hostOfGuest - before);
  data.write(source, at, length, hostOfGuest);
  readOld(image, scratch, 0, after, end);
  if (after > 0) data.write(scratch, 0, after, hostOfGuest + length);
}

function readOld(image: Image, target: Uint8Array, at: number, length: number, guest: number): void {
  if (length === 0) return;
  const inside = Math.max(0, Math.min(length, image.virtualSize() - guest));
  if (inside > 0) readRange(image, undefined, target, at, inside, guest);
  if (inside < length) target.fill(0, at + inside, at + length);
}

/** Whether nothing in the chain has data in this range: without reading any. */
export function readsAsZeros(image: Image, guest: number, length: number): boolean {
  const { extent, backing } = image;
  let position = guest;
  const end = Math.min(guest + length, image.virtualSize());
  while (position < end) {
    image.lock();
    try {
      lookup(image, undefined, position, end - position);
    } finally {
      image.unlock();
    }
    if (extent.kind === kind.DATA || extent.kind === kind.COMPRESSED) return false;
    if (extent.kind === kind.UNALLOCATED && backing !== undefined && position < backing.size()) {
      const below = backing.extentAt(position, Math.min(extent.length, backing.size() - position));
      if (below.data) return false;
      position += below.length;
    } else {
      position += extent.length;
    }
  }
  return true;
}

/** The guest range whose bytes must be complete in the new place; contains [guest, end). */
function neededAround(image: Image, plan: Plan, guest: number, end: number): { from: number; to: number } {
  const { clusterBytes, unitBytes, unitsPerCluster } = image.geometry;
  let from = guest - (guest % unitBytes);
  let to = Math.ceil(end / unitBytes) * unitBytes;
  if (unitsPerCluster === 1) return { from, to };
  if (!plan.fresh) {
    // The end of a subcluster that is there already may be overwritten in place by another thread meanwhile.
    const lastStart = end - 1 - ((end - 1) % clusterBytes);
    const unit = Math.floor((end - 1 - lastStart) / unitBytes);
    if ((heldUnits(image, lastStart) & (1 << unit)) !== 0) to = end;
  } else {
    // The old host cluster goes away: its subclusters come along.
    const first = heldUnits(image, plan.start);
    const lastStart = to - 1 - ((to - 1) % clusterBytes);
    const last = heldUnits(image, lastStart);
    if (first !== 0) from = Math.min(from, plan.start + (31 - Math.clz32(first & -first)) * unitBytes);
    if (last !== 0) to = Math.max(to, lastStart + (32 - Math.clz32(last)) * unitBytes);
  }
  return { from, to };
}

/** Bitmap of the subclusters that the entry's own host cluster (or compressed data) holds. */
function heldUnits(image: Image, clusterStart: number): number {
  image.lock();
  try {
    const entry = emptyEntry();
    readEntry(image, clusterStart, entry);
    return isCompressed(entry.high) ? ~0 : entry.allocated | 0;
  } finally {
    image.unlock();
  }
}

/** Point the entries at the written clusters and let go of what they held. With the mutex held. */
function link(image: Image, plan: Plan, guest: number, length: number): void {
  const { clusterBytes, unitBytes, unitsPerCluster } = image.geometry;
  const end = guest + length;
  const entry = linkEntry;
  for (let start = plan.start; start < end; start += clusterBytes) {
    readEntry(image, start, entry);
    const held = holdsData(image, entry);
    const oldAllocated = isCompressed(entry.high) ? ~0 : entry.allocated;
    if (plan.fresh) unlinkEntry(image, entry);
    const host = plan.host + (start - plan.start);
    entry.high = (highHalf(host) | COPIED) >>> 0;
    entry.low = lowHalf(host);
    if (unitsPerCluster !== 1) {
      const firstUnit = Math.max(0, Math.floor((guest - start) / unitBytes));
      const lastUnit = Math.min(unitsPerCluster - 1, Math.floor((end - 1 - start) / unitBytes));
      let written = 0;
      for (let unit = firstUnit; unit <= lastUnit; unit++) written |= 1 << unit;
      if (plan.fresh && oldAllocated !== 0) {
        // `fill` copied everything between the first held subcluster and the last: all of that is here now.
        const all = written | oldAllocated;
        const low = 31 - Math.clz32(all & -all);
        const high = 31 - Math.clz32(all);
        for (let unit = low; unit <= high; unit++) written |= 1 << unit;
      }
      entry.allocated = (entry.allocated | written) >>> 0;
      entry.zero = (entry.zero & ~written) >>> 0;
    }
    writeEntry(image, start, entry);
    if (!held) countData(image, 1);
  }
  // Clusters that were taken for more than came to be written.
  const linkedEnd = Math.ceil((end - plan.start) / clusterBytes) * clusterBytes + plan.start;
  if (plan.fresh && !image.geometry.externalData && linkedEnd < plan.end) {
    giveBack(image, (plan.host + (linkedEnd - plan.start)) / clusterBytes, (plan.end - linkedEnd) / clusterBytes);
  }
}

const linkEntry = emptyEntry();

/** The entry stands for data in the image itself (not zeros, not the backing file's). */
export function holdsData(image: Image, entry: L2Entry): boolean {
  if (image.geometry.unitsPerCluster === 1) {
    const found: Kind = kindOf(entry.high, entry.low, image.geometry.version, image.geometry.externalData);
    return found === kind.DATA || found === kind.COMPRESSED;
  }
  subclusterKind(entry.high, entry.low, entry.zero, entry.allocated, 0, image.geometry.externalData);
  return isCompressed(entry.high) || entry.allocated !== 0;
}

/** Drop the entry's reference to its host clusters. With the mutex held. */
export function unlinkEntry(image: Image, entry: L2Entry): void {
  const { clusterBytes, clusterBits, externalData } = image.geometry;
  if (isCompressed(entry.high)) {
    const host = compressedOffset(entry.high, entry.low, clusterBits);
    const first = Math.floor(host / clusterBytes);
    const last = Math.floor((host + compressedBytes(entry.high, entry.low, clusterBits) - 1) / clusterBytes);
    unlink(image, first, last - first + 1);
    return;
  }
  const host = hostOf(entry.high, entry.low);
  if (host === 0 || externalData) return;
  if (host % clusterBytes !== 0) throw image.fail(`an L2 entry points inside a cluster`);
  unlink(image, host / clusterBytes, 1);
}

/** @throws FsError EINVAL for a range outside of the disk */
export function checkRange(image: Image, guest: number, length: number): void {
  if (guest < 0 || length < 0 || guest + length > image.virtualSize()) {
    throw new FsError(
      'EINVAL',
      `bytes ${guest} to ${guest + length} are not on a disk of ${image.virtualSize()} bytes`,
    );
  }
}
