/** Making guest bytes read as zeros, by the tables where whole clusters are covered. */
import { beforeMetadata } from './first-write.ts';
import { relieve, relieveFull } from './flush.ts';
import type { Image } from './image.ts';
import { word } from './image.ts';
import { ALL_ZEROES, hostOf, isCompressed, isCopied } from './l2-entry.ts';
import { countData, emptyEntry, ensureOwnL2, type L2Entry, readEntry, writeEntry } from './l2-update.ts';
import { l2TableAt } from './lookup.ts';
import {
  beforeOthers,
  beginWrite,
  endWrite,
  holdsData,
  readsAsZeros,
  stepEnd,
  unlinkEntry,
  writePieces,
} from './write.ts';

/** Explicit zeros are written from here. */
const ZEROS = new Uint8Array(64 * 1024);

/** `free`: clusters go back to the host. `keep`: the image's own clusters stay, behind the zero flag. */
export type ZeroMode = 'free' | 'keep';

/**
 * The range reads as zeros afterwards. It must lie inside the disk.
 * @returns false when the gate is closed: ask again, doing it twice does no harm
 */
export function zeroRange(image: Image, guest: number, length: number, mode: ZeroMode): boolean {
  const end = guest + length;
  let position = guest;
  while (position < end) {
    const next = Math.min(end, stepEnd(image, position));
    relieveFull(image);
    if (!beginWrite(image)) return false;
    try {
      zeroPieces(image, position, next, mode);
    } finally {
      endWrite(image, position, next);
    }
    position = Math.max(next, skipUnmapped(image, next, end));
  }
  return true;
}

/** The same for whoever has closed the gate; frees clusters. Does nothing if `end` is not above `guest`. */
export function zeroStill(image: Image, guest: number, end: number): void {
  for (let position = guest; position < end; ) {
    const next = Math.min(end, stepEnd(image, position));
    zeroPieces(image, position, next, 'free');
    relieve(image);
    position = Math.max(next, skipUnmapped(image, next, end));
  }
}

/** Where nothing is mapped and nothing is below, a whole L2 table's span is passed at a time. */
function skipUnmapped(image: Image, position: number, end: number): number {
  const { l2SpanBytes } = image.geometry;
  let next = position;
  image.lock();
  try {
    while (next < end && next % l2SpanBytes === 0 && !isOverBacking(image, next)) {
      if (l2TableAt(image, undefined, next / l2SpanBytes) !== 0) break;
      next += l2SpanBytes;
    }
  } finally {
    image.unlock();
  }
  return Math.min(next, end);
}

function zeroPieces(image: Image, from: number, to: number, mode: ZeroMode): void {
  const { clusterBytes } = image.geometry;
  const firstWhole = Math.ceil(from / clusterBytes) * clusterBytes;
  // The last cluster is whole even if the disk ends inside it.
  const lastWhole = to === image.virtualSize() ? Math.ceil(to / clusterBytes) * clusterBytes : to - (to % clusterBytes);
  if (firstWhole >= lastWhole) {
    writeZeros(image, from, to);
    return;
  }
  writeZeros(image, from, firstWhole);
  let position = firstWhole;
  while (position < lastWhole) position = zeroClusters(image, position, lastWhole, mode);
  writeZeros(image, Math.min(lastWhole, to), to);
}

function writeZeros(image: Image, from: number, to: number): void {
  if (from >= to || readsAsZeros(image, from, to - from)) return;
  for (let position = from; position < to; position += ZEROS.length) {
    writePieces(image, ZEROS, 0, Math.min(ZEROS.length, to - position), position);
  }
}

/** Zero whole clusters from `start` on, as far as one L2 table goes; returns where to go on. */
function zeroClusters(image: Image, start: number, end: number, mode: ZeroMode): number {
  const { geometry, words } = image;
  const { clusterBytes, l2SpanBytes, rawData } = geometry;
  let changes = 0;
  let explicit = -1;
  image.lock();
  try {
    const spanEnd = (Math.floor(start / l2SpanBytes) + 1) * l2SpanBytes;
    const stop = beforeOthers(image, start, Math.min(end, spanEnd));
    changes = Atomics.load(words, word.IN_FLIGHT_CHANGES);
    if (stop > start) {
      if (rawData) zeroRawData(image, start, stop);
      let position = start;
      while (position < stop && zeroCluster(image, position, mode)) position += clusterBytes;
      if (position === stop) return stop;
      explicit = position;
    }
  } finally {
    image.unlock();
  }
  if (explicit < 0) {
    Atomics.wait(words, word.IN_FLIGHT_CHANGES, changes);
    return start;
  }
  writeZeros(image, explicit, Math.min(explicit + clusterBytes, image.virtualSize()));
  return explicit + clusterBytes;
}

/** A raw external data file must hold the zeros itself; what its entries say does not change. */
function zeroRawData(image: Image, from: number, to: number): void {
  const end = Math.min(to, image.virtualSize());
  if (image.data.punch(from, end - from)) return;
  for (let position = from; position < end; position += ZEROS.length) {
    image.data.write(ZEROS, 0, Math.min(ZEROS.length, end - position), position);
  }
}

/** Whether something may show at `guest` where the image has nothing of its own, now or later. */
function isOverBacking(image: Image, guest: number): boolean {
  const { backing, words } = image;
  return backing !== undefined && (guest < backing.size() || Atomics.load(words, word.KEEP_HIDDEN) === 1);
}

/**
 * From now on nothing that the image has of its own goes away: what is discarded becomes zeros of its own also where
 * nothing is below yet. For moving data between this image and the one below, which may grow, or be replaced.
 */
export function keepHidden(image: Image): void {
  image.lock();
  Atomics.store(image.words, word.KEEP_HIDDEN, 1);
  image.unlock();
}

const entry = emptyEntry();
const before = emptyEntry();

/**
 * Change one entry so that its cluster reads as zeros. With the mutex held.
 * @returns false if the format has no entry for that (version 2 over a backing file): zeros must be written
 */
function zeroCluster(image: Image, guest: number, mode: ZeroMode): boolean {
  const { version, unitsPerCluster, rawData, externalData, clusterBytes } = image.geometry;
  if (rawData) return true;
  readEntry(image, guest, entry);
  const hide = isOverBacking(image, guest);
  Object.assign(before, entry);
  const held = holdsData(image, entry);
  const host = isCompressed(entry.high) ? 0 : hostOf(entry.high, entry.low);
  const keep = mode === 'keep' && version >= 3 && host !== 0 && isCopied(entry.high);
  if (!held && host === 0 && !hide && entry.zero === 0) return true;
  if (version < 3 && hide) return false;
  if (!keep) {
    entry.high = 0;
    entry.low = 0;
  }
  const zeros = keep || hide;
  if (unitsPerCluster === 1) {
    entry.low = zeros ? (entry.low | ALL_ZEROES) >>> 0 : entry.low;
  } else {
    entry.zero = zeros ? 0xffff_ffff : 0;
    entry.allocated = 0;
  }
  if (sameEntry(entry, before)) return true;
  beforeMetadata(image);
  ensureOwnL2(image, Math.floor(guest / image.geometry.l2SpanBytes));
  if (!keep) unlinkEntry(image, before);
  if (externalData && !keep && host !== 0) image.data.punch(host, clusterBytes);
  writeEntry(image, guest, entry);
  if (held) countData(image, -1);
  return true;
}

const sameEntry = (a: L2Entry, b: L2Entry): boolean =>
  a.high === b.high && a.low === b.low && a.zero === b.zero && a.allocated === b.allocated;
