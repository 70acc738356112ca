/**
 * Making one layer of two, an overlay and what it stands on, while the disk is in use. The smaller side moves: what the
 * overlay has goes down, or what is below comes up and the overlay takes over the name of the file below.
 *
 * At every instant the names on disk lead to correct chains; what a crash or an abort leaves is an overlay that is marked
 * as being merged, and merging it again goes on from there (mend-overlays.ts does what is left when nothing has to move).
 */
import { chmodSync, chownSync, statfsSync, statSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { FsError } from '../errors.ts';
import { commitAll, commitWritten, finishCommit, prepareCommit } from '../qcow2/commit-down.ts';
import { imageTarget } from '../qcow2/commit-target.ts';
import { flush } from '../qcow2/flush.ts';
import { readHeader } from '../qcow2/header.ts';
import type { Image } from '../qcow2/image.ts';
import { commitCost, type MoveCost, pullCost } from '../qcow2/move-cost.ts';
import { closeImage } from '../qcow2/open-image.ts';
import { imageLayer } from '../qcow2/own-extents.ts';
import { preparePull, pullUp } from '../qcow2/pull-up.ts';
import { atOnce, inSteps, type StepOptions, type Steps } from '../qcow2/steps.ts';
import { stopTracking, trackWrites, writtenBytes } from '../qcow2/written-map.ts';
import { lockImage } from '../storage/image-lock.ts';
import { type Layer, loadFrozen } from './layer.ts';
import type { LayerTree } from './layer-tree.ts';
import { forgetElsewhere, reopenForWriting, standOn, switchLayer } from './overlay.ts';
import { addName, removeOverlayFiles, replaceName, secondName, unlinkDurably } from './overlay-files.ts';
import { overlaysElsewhere, rememberOverlays, writeMark } from './overlay-mark.ts';

/** What the disk does for a change of its layers. */
export interface LayersHost {
  readonly tree: LayerTree;
  /** Views of all threads follow the layers from now on; resolves when no thread uses what they showed before. */
  relinked(): Promise<void>;
}

/** Rounds over what was written meanwhile, at most: a writer may be faster than we are. */
const MOST_ROUNDS = 12;
/** What is left for the moment in which writers wait. */
const LAST_ROUND_BYTES = 4 * 2 ** 20;
/** What the host is to have left for others. */
const SPARE_BYTES = 2 ** 20;

/**
 * Merge an overlay with the layer below, on which nothing else stands. The layer that is left has the name of the one
 * below, and the contents of the overlay.
 * @returns it
 * @throws FsError ENOSPC before anything was changed, if the host has too little room; EINTR when aborted; EIO
 */
export async function mergeLayers(host: LayersHost, upper: Layer, options: StepOptions): Promise<Layer> {
  const lower = below(upper);
  try {
    const direction = await cheaperDirection(upper, lower, options);
    if (direction === 'down') {
      await commitLayer(host, upper, lower, options);
      return lower;
    }
    await pullLayer(host, upper, lower, options);
    return upper;
  } catch (error) {
    if (!options.signal?.aborted) throw error;
    throw new FsError(
      'EINTR',
      `merging ${upper.name} was broken off: nothing is lost, the disk goes on as before, and deleting the overlay again goes on from there`,
      { cause: error },
    );
  }
}

function below(upper: Layer): Layer {
  if (upper.below === undefined) throw new Error(`${upper.path} stands on nothing`);
  return upper.below;
}

type Direction = 'down' | 'up';

async function cheaperDirection(upper: Layer, lower: Layer, { signal }: StepOptions): Promise<Direction> {
  const quiet = signal === undefined ? {} : { signal };
  const down = await inSteps(commitCost(upper.image, lower.image), quiet);
  const costs: { direction: Direction; cost: MoveCost; folder: string }[] = [
    { direction: 'down', cost: down, folder: dirname(lower.path) },
  ];
  if (mayReplace(upper, lower)) {
    const up = await inSteps(pullCost(upper.image, [imageLayer(lower.image)], lower.below?.backing), quiet);
    costs.push({ direction: 'up', cost: up, folder: dirname(upper.path) });
  }
  costs.sort((a, b) => a.cost.moved - b.cost.moved);
  const fitting = costs.find(({ cost, folder }) => cost.allocated + SPARE_BYTES <= freeBytes(folder));
  if (fitting !== undefined) return fitting.direction;
  const needed = Math.min(...costs.map(({ cost }) => cost.allocated));
  throw new FsError(
    'ENOSPC',
    `merging ${upper.name} with ${lower.name} needs ${needed} bytes in ${dirname(lower.path)}, where ${freeBytes(dirname(lower.path))} are free; make room, then delete it again`,
  );
}

/**
 * The file below may be replaced by the overlay's: nothing of it is lost that is not a part of its disk, and the overlay
 * can take its name by hard links.
 */
function mayReplace(upper: Layer, lower: Layer): boolean {
  const { qcow2 } = lower;
  if (qcow2 === undefined || lower.file.readOnly || qcow2.snapshots.entries.length > 0) return false;
  const { header } = qcow2;
  if (header.version < 3 || header.externalDataFile || header.bitmaps !== undefined) return false;
  if (dirname(upper.path) !== dirname(lower.path)) return false;
  const stat = statSync(lower.path);
  return stat.isFile() && stat.nlink === 1;
}

function freeBytes(folder: string): number {
  const { bavail, bsize } = statfsSync(folder);
  return bavail * bsize;
}

/** The checkpoint is there no more: what it showed is about to change, or its file to be another's. Durable. */
function beginMerge(upper: Layer, takesName: string): void {
  const { mark } = upper;
  if (mark === undefined) throw new Error(`${upper.path} is no overlay of this program`);
  upper.mark = { ...mark, merging: true, takesName };
  writeMark(upper.file, upper.mark);
}

async function commitLayer(host: LayersHost, upper: Layer, lower: Layer, options: StepOptions): Promise<void> {
  const { tree } = host;
  beginMerge(upper, '');
  reopenForWriting(lower, tree.options.cacheBytes);
  upper.follow(lower);
  await host.relinked();
  try {
    const target = imageTarget(lower.image);
    await prepareCommit(upper.image, target);
    if (tree.active === upper) {
      await commitInRounds(upper.image, lower.image, options);
      await switchLayer(
        upper,
        lower,
        async () => {
          atOnce(commitWritten(upper.image, target));
          await finishCommit(upper.image, target, { shrink: true });
          flush(lower.image);
          takeOver(lower, upper);
          dropFile(upper, lower);
        },
        () => tree.activate(lower),
        () => host.relinked(),
      );
    } else {
      await inSteps(commitAll(upper.image, target), options);
      await finishCommit(upper.image, target, { shrink: true });
      freezeAgain(lower);
      for (const layer of tree.above(upper)) standOn(layer, lower);
      dropFile(upper, lower);
      await host.relinked();
    }
  } catch (error) {
    stopTracking(upper.image);
    // Done is done: only the tidying failed.
    if (tree.active !== lower) freezeAgain(lower);
    throw error;
  }
  tree.remove(upper);
}

/** The layer is only read from now on. */
function freezeAgain(layer: Layer): void {
  closeImage(layer.image);
  layer.reopen(loadFrozen(layer));
  lockImage(layer.file.fd, layer.path, 'read', 'write');
}

/** Everything, and again what was written meanwhile, until little is left. */
async function commitInRounds(upper: Image, lower: Image, options: StepOptions): Promise<void> {
  const target = imageTarget(lower);
  trackWrites(upper);
  await inSteps(scaled(commitAll(upper, target), 0, 0.9), options);
  let left = Number.POSITIVE_INFINITY;
  for (let round = 0; round < MOST_ROUNDS; round++) {
    const written = writtenBytes(upper);
    if (written <= LAST_ROUND_BYTES || written >= left) break;
    left = written;
    await inSteps(scaled(commitWritten(upper, target), 0.9, 0.99), options);
  }
}

function* scaled<T>(steps: Steps<T>, from: number, to: number): Steps<T> {
  for (;;) {
    const step = steps.next();
    if (step.done === true) return step.value;
    yield from + step.value * (to - from);
  }
}

/** The layer below is the end of the chain from now on, in place of the one above. */
function takeOver(lower: Layer, upper: Layer): void {
  if (lower.mark === undefined || upper.mark === undefined) return;
  lower.mark = { ...lower.mark, kept: false, sequence: upper.mark.sequence };
  writeMark(lower.file, lower.mark);
}

function dropFile(upper: Layer, lower: Layer): void {
  forgetElsewhere(lower, upper.path);
  removeOverlayFiles(upper.path);
}

async function pullLayer(host: LayersHost, upper: Layer, lower: Layer, options: StepOptions): Promise<void> {
  const { tree } = host;
  const { path } = lower;
  const oldPath = upper.path;
  const second = secondName(path);
  // Should we die between the two names, the file below says who is to take its own.
  const known = overlaysElsewhere(readHeader(lower.file));
  if (!known.includes(oldPath)) rememberOverlays(lower.file, [...known, oldPath]);
  const frozen = tree.active !== upper;
  upper.mark = upper.mark && {
    ...upper.mark,
    // What is left is the overlay of the checkpoint below.
    ...(lower.mark && { createdMs: lower.mark.createdMs, details: lower.mark.details }),
    becomesBottom: lower === tree.bottom,
  };
  beginMerge(upper, basename(path));
  // Whether it can have a second name is known before anything moves.
  addName(oldPath, second);
  unlinkDurably(second);
  if (frozen) {
    reopenForWriting(upper, tree.options.cacheBytes);
    for (const layer of tree.above(upper)) layer.follow(upper);
    await host.relinked();
  }
  try {
    preparePull(upper.image);
    await inSteps(pullUp(upper.image, [imageLayer(lower.image)], lower.below?.backing), options);
    flush(upper.image);
  } finally {
    if (frozen) freezeAgain(upper);
  }
  copyOwner(path, oldPath);
  standOn(upper, lower.below);
  addName(oldPath, second);
  replaceName(second, path);
  upper.moveTo(path);
  for (const layer of tree.above(upper)) standOn(layer, upper);
  removeOverlayFiles(oldPath);
  if (lower.mark === undefined) tree.replaceBottom(upper);
  upper.mark = upper.mark && { ...upper.mark, merging: false, takesName: '', bottom: lower.mark === undefined };
  if (upper.mark !== undefined) writeMark(upper.file, upper.mark);
  if (lower.mark === undefined) upper.mark = undefined;
  await host.relinked();
  tree.remove(lower);
}

/** The new file of a name is whose the old one was, as far as that is allowed. */
function copyOwner(from: string, to: string): void {
  const { mode, uid, gid } = statSync(from);
  chmodSync(to, mode & 0o7777);
  try {
    chownSync(to, uid, gid);
  } catch {
    // Not ours to give away: then it is ours.
  }
}
