/**
 * Moving what an image has of its own into the image below it.
 *
 * At every instant the image over the one below reads the same: whatever is written below is what the image above hides.
 * So a commit may be broken off at any moment, by an abort, a crash or a full disk, and be done again from the start. It
 * needs that nothing the image above has goes away meanwhile (`keepHidden`), that neither image has snapshots taken,
 * applied or deleted, nor its size changed, and that the image above has no internal snapshots: what shows through their
 * holes would change.
 *
 * Of an image that is not written (any more):
 *
 *     await prepareCommit(upper, lower);
 *     await inSteps(commitAll(upper, lower), { progress, signal });
 *     await finishCommit(upper, lower, { shrink });
 *     … now the chain may go on without the image above
 *
 * Of an image with writers, in rounds: `prepareCommit`, `trackWrites`, `commitAll`, then `commitWritten` for as long as
 * `writtenBytes` falls; then with its gate closed `atOnce(commitWritten(…))`, `finishCommit`, and the switch.
 */
import type { CommitTarget } from './commit-target.ts';
import { keepHidden } from './discard.ts';
import type { Image } from './image.ts';
import { imageLayer, joinZeros, ownExtents } from './own-extents.ts';
import { readRange } from './read.ts';
import type { Steps } from './steps.ts';
import { noteWritten, takeWritten } from './written-map.ts';

/** Data that one step moves at most. */
const COPY_BYTES = 2 * 2 ** 20;
/** Extents that one step looks at, at most. */
const STEP_EXTENTS = 256;

/**
 * Before the first step: what the image above has stays its own from now on, until it is opened anew, and the image below
 * is at least as long. A longer one keeps its size for now.
 * @throws FsError EFBIG, ENOSPC, EIO; nothing is changed then
 */
export async function prepareCommit(upper: Image, lower: CommitTarget): Promise<void> {
  keepHidden(upper);
  const size = upper.virtualSize();
  if (lower.size() < size) await lower.grow(size);
}

/** Write everything that the image above has into the one below. */
export function* commitAll(upper: Image, lower: CommitTarget): Steps {
  yield* commitRange(upper, lower, 0, upper.virtualSize());
}

/** The same for what was written since the last round (written-map.ts). What fails, or is broken off, counts as written again. */
export function* commitWritten(upper: Image, lower: CommitTarget): Steps {
  const size = upper.virtualSize();
  for (const { from, to } of takeWritten(upper)) {
    let done = false;
    try {
      for (const _ of commitRange(upper, lower, from, to)) yield from / size;
      done = true;
    } finally {
      if (!done) noteWritten(upper, from, to);
    }
    yield to / size;
  }
}

/**
 * Everything below is durable when it resolves: the image above may be dropped.
 * @param options.shrink the image below gets the size of the one above, if it is longer: what it has behind that is hidden
 * in the chain so far, and would come to light in one that is longer. Without it, it keeps its size, as with `qemu-img commit`.
 */
export async function finishCommit(upper: Image, lower: CommitTarget, options: { shrink: boolean }): Promise<void> {
  lower.flush();
  const size = upper.virtualSize();
  if (options.shrink && lower.size() > size) await lower.shrink(size);
}

function* commitRange(upper: Image, lower: CommitTarget, from: number, to: number): Steps {
  const buffer = new Uint8Array(Math.min(COPY_BYTES, to - from));
  const fraction = (position: number): number => (position - from) / (to - from);
  /** Data found and not copied yet: [start, end). */
  let start = from;
  let end = from;
  const copy = (): void => {
    if (start === end) return;
    readRange(upper, undefined, buffer, 0, end - start, start);
    lower.write(buffer, 0, end - start, start);
    start = end;
  };
  let looked = 0;
  for (const extent of joinZeros(ownExtents(imageLayer(upper), from, to - from))) {
    const extentEnd = extent.offset + extent.length;
    const isData = extent.kind === 'data' || extent.kind === 'compressed';
    if (isData) {
      if (end !== extent.offset) {
        copy();
        start = end = extent.offset;
      }
      while (end < extentEnd) {
        end = Math.min(extentEnd, start + buffer.length);
        if (end - start < buffer.length) break;
        copy();
        yield fraction(end);
      }
    } else if (extent.kind === 'zero') {
      lower.zero(extent.offset, extent.length);
      yield fraction(extentEnd);
    }
    if (++looked % STEP_EXTENTS === 0) yield fraction(extentEnd);
  }
  copy();
}
