/** Where two moments of a disk differ, from the tables alone: what shares its place in one file is the same. */
import type { OwnExtent, OwnLayer } from './own-extents.ts';
import type { Steps } from './steps.ts';

/** One image of a chain, or a snapshot in it. */
export interface MomentLayer {
  readonly layer: OwnLayer;
  /** The same object for all that share clusters: the live mapping and the snapshots of one image file. */
  readonly file: unknown;
}

/** What a disk is, or was, made of: top first. Its size is that of the first. */
export type Moment = readonly MomentLayer[];

/** A run of guest bytes that are not known to be the same. */
export interface Difference {
  readonly offset: number;
  /** At least 1. */
  readonly length: number;
  /** What is there at the later moment. `zero`: nothing, or what reads as zeros by the tables. */
  readonly kind: 'data' | 'zero';
}

/** Where the bytes of a run are. `file` undefined: they are zeros. */
interface Place {
  readonly length: number;
  readonly file: unknown;
  readonly host: number;
  readonly kind: OwnExtent['kind'];
}

/** Runs that one step looks at, at most. */
const STEP_RUNS = 256;

/**
 * All differences, in order; those that touch, and are of one kind, as one. Behind the end of the shorter disk zeros are
 * compared. What was written with the bytes that were there before counts as different.
 * @throws CorruptImage
 */
export function* differences(from: Moment, to: Moment): Steps<Difference[]> {
  const size = Math.max(sizeOf(from), sizeOf(to));
  const found: { offset: number; length: number; kind: Difference['kind'] }[] = [];
  let looked = 0;
  for (let position = 0; position < size; ) {
    const after = placeAt(to, position, size - position);
    const before = placeAt(from, position, after.length);
    const { length } = before;
    if (!isSame(before, after)) {
      const kind = after.file === undefined ? 'zero' : 'data';
      const last = found.at(-1);
      if (last !== undefined && last.kind === kind && last.offset + last.length === position) last.length += length;
      else found.push({ offset: position, length, kind });
    }
    position += length;
    if (++looked % STEP_RUNS === 0) yield position / size;
  }
  return found;
}

export const sizeOf = (moment: Moment): number => moment[0]?.layer.size() ?? 0;

/** The host bytes of two runs of one length, at one guest offset. */
const isSame = (a: Place, b: Place): boolean => a.file === b.file && a.host === b.host && a.kind === b.kind;

/** What is at `offset`, for at most `length` bytes. */
function placeAt(moment: Moment, offset: number, length: number): Place {
  let run = length;
  for (const { layer, file } of moment) {
    const size = layer.size();
    // Behind its end a layer hides what is below.
    if (offset >= size) break;
    run = Math.min(run, size - offset);
    const extent = layer.extentAt(offset, run);
    run = extent.length;
    if (extent.kind === 'zero') break;
    if (extent.kind !== 'unallocated') return { length: run, file, host: extent.host, kind: extent.kind };
  }
  return { length: run, file: undefined, host: 0, kind: 'zero' };
}
