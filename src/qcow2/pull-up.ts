/**
 * Moving what the images between an image and a base have into that image, which may be written all the time. Afterwards
 * it reads the same with the base as its backing file, or with none.
 *
 * At every instant it reads the same with the old chain below it, too: only what it does not have is filled in, with what
 * shows there. So a pull may be broken off at any moment and be done again from the start. It needs that what is below
 * does not change, that no snapshot of the image is taken, applied or deleted meanwhile, nor its size changed, and that it
 * has no internal snapshots: their holes show what is below.
 *
 *     preparePull(upper);
 *     await inSteps(pullUp(upper, between, base), { progress, signal });
 *     flush(upper);
 *     … now the header may name the base as the backing file
 */

import { keepHidden } from './discard.ts';
import { beforeMetadata } from './first-write.ts';
import { type Backing, type Image, word } from './image.ts';
import { ALL_ZEROES, kind, kindOf, subclusterKind } from './l2-entry.ts';
import { emptyEntry, ensureOwnL2, readEntry, writeEntry } from './l2-update.ts';
import { imageLayer, type OwnLayer, ownExtents } from './own-extents.ts';
import type { Steps } from './steps.ts';
import { asWriter, beforeOthers, stepEnd, writeUnallocated } from './write.ts';

/** Data that one step moves at most. */
const COPY_BYTES = 2 * 2 ** 20;
const ZEROS = new Uint8Array(COPY_BYTES);
/** Runs that one step looks at, at most. */
const STEP_RUNS = 256;

/** Before the first step: what the image has stays its own from now on, until it is opened anew. */
export const preparePull = (upper: Image): void => keepHidden(upper);

/**
 * Fill in what the images between have.
 * @param between the images that will be gone from the chain, top first; the first one is the present backing file
 * @param base what is below them, as it will be below `upper`; undefined: nothing
 * @returns bytes written
 * @throws FsError ENOSPC, EIO: what was filled in until then stays
 */
export function* pullUp(upper: Image, between: readonly OwnLayer[], base: Backing | undefined): Steps<number> {
  const size = upper.virtualSize();
  const buffer = new Uint8Array(COPY_BYTES);
  let moved = 0;
  let looked = 0;
  for (const { offset, length, action } of missing(upper, between, base)) {
    const end = offset + length;
    for (let position = offset; position < end && action !== 'leave'; ) {
      const next = Math.min(end, stepEnd(upper, position), position + COPY_BYTES);
      const done =
        action === 'zero'
          ? asWriter(upper, position, next, () => zeroUnallocated(upper, position, next))
          : asWriter(upper, position, next, () => {
              moved += fillIn(upper, base, buffer, position, next);
            });
      // Closed gate: again when it is open.
      if (done) position = next;
      yield position / size;
    }
    if (++looked % STEP_RUNS === 0) yield end / size;
  }
  return moved;
}

/** What is to be done with a run of units that the image lacks. */
export interface Missing {
  readonly offset: number;
  readonly length: number;
  /** `leave`: shows the base, or nothing, afterwards as well. */
  readonly action: 'copy' | 'zero' | 'leave';
}

/** Runs of whole units (or to the disk's end) that the image lacks, in order, with what a pull does to each. */
export function* missing(
  upper: Image,
  between: readonly OwnLayer[],
  base: Backing | undefined,
): Generator<Missing, void> {
  const { unitBytes, version } = upper.geometry;
  for (const extent of ownExtents(imageLayer(upper), 0, upper.virtualSize())) {
    if (extent.kind !== 'unallocated') continue;
    const end = extent.offset + extent.length;
    for (let position = extent.offset; position < end; ) {
      const shown = shownAt(between, base, position, end - position);
      let { what } = shown;
      let length = position + shown.length === end ? shown.length : shown.length - (shown.length % unitBytes);
      if (length === 0) {
        length = Math.min(unitBytes, end - position);
        what = mixed(between, base, position, length);
      }
      // Version 2 has no zeros but written ones.
      const action = what === 'zero' && version < 3 ? 'copy' : actions[what];
      yield { offset: position, length, action };
      position += length;
    }
  }
}

/**
 * What shows where the image has nothing: data or zeros of an image between, or what the base has. `nothing`: it reads as
 * zeros now, and will so over the base.
 */
type Shown = 'data' | 'zero' | 'base' | 'nothing';

const actions = { data: 'copy', zero: 'zero', base: 'leave', nothing: 'leave' } as const;

function shownAt(
  between: readonly OwnLayer[],
  base: Backing | undefined,
  offset: number,
  length: number,
): { readonly what: Shown; readonly length: number } {
  let run = length;
  for (const layer of between) {
    const size = layer.size();
    if (offset >= size) return zeroOver(base, offset, run);
    const extent = layer.extentAt(offset, Math.min(run, size - offset));
    run = extent.length;
    if (extent.kind === 'zero') return zeroOver(base, offset, run);
    if (extent.kind !== 'unallocated') return { what: 'data', length: run };
  }
  const over = zeroOver(base, offset, run);
  return { what: over.what === 'zero' ? 'base' : 'nothing', length: over.length };
}

/** Zeros need saying only where the base has data. */
function zeroOver(
  base: Backing | undefined,
  offset: number,
  length: number,
): { readonly what: 'zero' | 'nothing'; readonly length: number } {
  const inside = base === undefined ? 0 : base.size() - offset;
  if (base === undefined || inside <= 0) return { what: 'nothing', length };
  const below = base.extentAt(offset, Math.min(length, inside));
  return { what: below.data ? 'zero' : 'nothing', length: below.length };
}

/** Of one unit that is not all of a kind. */
function mixed(between: readonly OwnLayer[], base: Backing | undefined, offset: number, length: number): Shown {
  const found = new Set<Shown>();
  for (let done = 0; done < length; ) {
    const shown = shownAt(between, base, offset + done, length - done);
    found.add(shown.what);
    done += shown.length;
  }
  if (found.has('data') || (found.has('zero') && found.has('base'))) return 'data';
  if (found.has('zero')) return 'zero';
  return found.has('base') ? 'base' : 'nothing';
}

/** Copy what shows in [from, to) to where the image has nothing; zeros as such. Returns the bytes written. As a writer. */
export function fillIn(upper: Image, base: Backing | undefined, buffer: Uint8Array, from: number, to: number): number {
  const { unitBytes, version } = upper.geometry;
  readBelow(upper, buffer, from, to);
  let moved = 0;
  for (let start = from; start < to; ) {
    const zeros = isZero(buffer, start - from, Math.min(unitBytes, to - start));
    let end = Math.min(to, start + unitBytes);
    while (end < to && isZero(buffer, end - from, Math.min(unitBytes, to - end)) === zeros) {
      end = Math.min(to, end + unitBytes);
    }
    if (!zeros || (version < 3 && hasData(base, start, end))) {
      for (let position = start; position < end; ) {
        position += writeUnallocated(upper, buffer, position - from, end - position, position);
      }
      moved += end - start;
    } else if (hasData(base, start, end)) {
      zeroUnallocated(upper, start, end);
    }
    start = end;
  }
  return moved;
}

/** What is below, whatever the image has by now. */
function readBelow({ backing }: Image, buffer: Uint8Array, from: number, to: number): void {
  const there = backing === undefined ? 0 : Math.max(0, Math.min(to, backing.size()) - from);
  if (there > 0) backing?.read(buffer, 0, there, from);
  buffer.fill(0, there, to - from);
}

const isZero = (bytes: Uint8Array, at: number, length: number): boolean =>
  Buffer.compare(bytes.subarray(at, at + length), ZEROS.subarray(0, length)) === 0;

function hasData(base: Backing | undefined, from: number, to: number): boolean {
  for (let position = from; position < to; ) {
    const over = zeroOver(base, position, to - position);
    if (over.what === 'zero') return true;
    position += over.length;
  }
  return false;
}

const entry = emptyEntry();

/** Whole clusters and units of [from, to) that the image lacks become zeros of its own. As a writer, version 3. */
function zeroUnallocated(image: Image, from: number, to: number): void {
  const { words } = image;
  const { clusterBytes, l2SpanBytes } = image.geometry;
  for (let position = from; position < to; ) {
    const spanEnd = (Math.floor(position / l2SpanBytes) + 1) * l2SpanBytes;
    let changes = 0;
    let stop = position;
    image.lock();
    try {
      stop = beforeOthers(image, position, Math.min(to, spanEnd));
      changes = Atomics.load(words, word.IN_FLIGHT_CHANGES);
      while (position < stop) {
        const start = position - (position % clusterBytes);
        const end = Math.min(stop, start + clusterBytes);
        zeroUnits(image, start, position, end);
        position = end;
      }
    } finally {
      image.unlock();
    }
    if (position < to && position < spanEnd) Atomics.wait(words, word.IN_FLIGHT_CHANGES, changes);
  }
}

/** The units of [from, to) in the cluster at `start`, those that are unallocated. With the mutex held. */
function zeroUnits(image: Image, start: number, from: number, to: number): void {
  const { version, externalData, unitBytes, unitsPerCluster, l2SpanBytes } = image.geometry;
  readEntry(image, start, entry);
  const { high, low, zero, allocated } = entry;
  if (unitsPerCluster === 1) {
    if (kindOf(high, low, version, externalData) !== kind.UNALLOCATED) return;
    entry.low = (low | ALL_ZEROES) >>> 0;
  } else {
    let units = 0;
    for (let unit = (from - start) / unitBytes; start + unit * unitBytes < to; unit++) {
      const found = subclusterKind(high, low, zero, allocated, unit, externalData);
      if (found === kind.UNALLOCATED) units |= 1 << unit;
    }
    if (units === 0) return;
    entry.zero = (zero | units) >>> 0;
  }
  beforeMetadata(image);
  ensureOwnL2(image, Math.floor(start / l2SpanBytes));
  writeEntry(image, start, entry);
}
