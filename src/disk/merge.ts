/**
 * Committing an overlay down its chain. The overlay reads the same at every instant: what is written below is hidden by it,
 * or by an image between, until it is emptied, in one write of its header, after everything below is durable. So a merge
 * may be broken off at any moment, by an abort, a crash or a full disk, and be done again.
 */
import { existsSync, realpathSync, unlinkSync } from 'node:fs';
import { basename, dirname, resolve } from 'node:path';
import { FsError } from '../errors.ts';
import { rebuildRefcounts } from '../qcow2/check.ts';
import { commitAll } from '../qcow2/commit-down.ts';
import { type CommitTarget, imageTarget, rawTarget } from '../qcow2/commit-target.ts';
import { compactImage } from '../qcow2/compact/compact.ts';
import { readHeader } from '../qcow2/header.ts';
import { writeBacking } from '../qcow2/header-update.ts';
import { closeImage, snapshotList } from '../qcow2/open-image.ts';
import { isMarked, unmark } from '../qcow2/session-mark.ts';
import { newSnapshotEntry, readSnapshotTable } from '../qcow2/snapshot-table.ts';
import { applySnapshot } from '../qcow2/snapshots.ts';
import { inSteps } from '../qcow2/steps.ts';
import { syncDirectory } from '../storage/directory.ts';
import { HostFile } from '../storage/host-file.ts';
import { lockImage } from '../storage/image-lock.ts';
import type { Work } from './disk.ts';
import { FolderScan } from './folder-scan.ts';
import { Layer, loadImage } from './layer.ts';
import { openChain } from './open-chain.ts';
import { DEFAULT_CACHE_BYTES, openDisk } from './open-disk.ts';
import { recordedName } from './overlay.ts';

export interface MergeOptions {
  /** Which file of the chain gets the contents; left out: the backing file. */
  readonly into?: string | undefined;
  /** More folders with images that may depend on those that change. */
  readonly backingRoots?: readonly string[];
}

export interface Merged {
  /** Path of the file that has the contents now. */
  readonly base: string;
  /** Files that are gone: those between, and an overlay that was an external checkpoint. */
  readonly removed: readonly string[];
}

/** @throws FsError EINVAL, ENOENT, EBUSY, EROFS, ENOSPC, EIO, and the signal's reason; the overlay reads as before then */
export async function mergeOverlay(path: string, options: MergeOptions, work: Work = {}): Promise<Merged> {
  const imagePath = realpathSync(path);
  const into = options.into === undefined ? undefined : await intoPath(imagePath, options.into);
  if ((await new FolderScan().image(imagePath))?.mark !== undefined) {
    return mergeCheckpoints(imagePath, into, options, work);
  }
  const { top, unwritable } = await openChain(imagePath, {
    readOnly: false,
    cacheBytes: DEFAULT_CACHE_BYTES,
    mayWrite: new Set(into === undefined ? await backingOf(imagePath) : [into]),
  });
  const opened = new Set(top.chain);
  try {
    if (unwritable !== undefined) throw new FsError('EROFS', `${path}: cannot be changed: ${unwritable}`);
    try {
      return await mergeOpened(top, into, options, work, opened);
    } finally {
      closeImage(top.image);
    }
  } finally {
    for (const layer of opened) layer[Symbol.dispose]();
  }
}

async function backingOf(imagePath: string): Promise<string[]> {
  const backing = (await new FolderScan().image(imagePath))?.backing;
  return backing === undefined ? [] : [backing];
}

/** Relative to the working directory, or else to the image's folder. */
async function intoPath(imagePath: string, name: string): Promise<string> {
  for (const candidate of [resolve(name), resolve(dirname(imagePath), name)]) {
    try {
      return realpathSync(candidate);
    } catch {
      // The other one, then.
    }
  }
  throw new FsError('ENOENT', `${name}: no such file; give one of the files below ${imagePath} (vdskfs info --chain)`);
}

async function mergeOpened(
  top: Layer,
  into: string | undefined,
  { backingRoots = [] }: MergeOptions,
  { progress = () => {}, signal }: Work,
  opened: Set<Layer>,
): Promise<Merged> {
  const { chain } = top;
  if (chain.length === 1)
    throw new FsError('EINVAL', `${top.path}: stands on no other file, so that there is nothing to merge it into`);
  const depth = into === undefined ? 1 : chain.findIndex(({ path }) => path === into);
  if (depth < 1)
    throw new FsError('EINVAL', `${into}: is none of the files that ${top.path} stands on (vdskfs info --chain)`);
  const between = chain.slice(1, depth);
  const frozen = chain[depth] as Layer;
  refuseSnapshots(top, between);
  await refuseDependents(top, [...between, frozen], backingRoots);

  const base = openForWriting(frozen);
  opened.delete(frozen);
  opened.add(base);
  (chain[depth - 1] as Layer).follow(base);
  const target = base.qcow2 === undefined ? rawTarget(base.file) : imageTarget(base.qcow2.image);
  try {
    await commit(top, between, target, (part) => progress(part * 0.95), signal);
  } finally {
    if (base.qcow2 !== undefined) closeImage(base.qcow2.image);
  }
  if (between.length > 0) {
    switchBacking(top, base);
    // At once: what they show is wrong now, and they would stand in the way of another merge.
    for (const { path } of between) unlinkSync(path);
    for (const folder of new Set(between.map(({ path }) => dirname(path)))) syncDirectory(folder);
  }
  // A plain external data file holds the disk itself: nothing to be emptied.
  if (!top.image.geometry.rawData) await empty(top, (part) => progress(0.95 + part * 0.05));
  return { base: base.path, removed: between.map(({ path }) => path) };
}

/** The snapshots of a file that goes away would go with it; those of the overlay show what is below it. */
function refuseSnapshots(top: Layer, between: readonly Layer[]): void {
  const list = ({ qcow2 }: Layer): string =>
    (qcow2?.snapshots.entries ?? []).map(({ name }) => JSON.stringify(name)).join(', ');
  const shown = list(top);
  if (shown !== '') {
    throw new FsError(
      'EBUSY',
      `${top.path}: its checkpoints ${shown} show what is in the files below, and would change with them; delete or export them first`,
    );
  }
  for (const layer of between) {
    const held = list(layer);
    if (held !== '') {
      throw new FsError(
        'EBUSY',
        `${layer.path}: goes away with the merge, and holds the checkpoints ${held}; delete or export them first`,
      );
    }
    if (layer.mark !== undefined) {
      throw new FsError(
        'EBUSY',
        `${layer.path}: goes away with the merge, and is an external checkpoint; delete that first (vdskfs delete --external)`,
      );
    }
  }
}

/** Others that stand on a file that changes, found in its folder and in the roots given. */
async function refuseDependents(top: Layer, changing: readonly Layer[], roots: readonly string[]): Promise<void> {
  const scan = new FolderScan();
  const own = new Set(top.chain.map(({ path }) => path));
  const paths = new Map(changing.map((layer) => [layer.path, layer]));
  const folders = new Set([...top.chain, ...changing].map(({ path }) => dirname(path)));
  for (const root of roots) folders.add(root);
  for (const folder of folders) {
    for (const image of await scan.folder(folder)) {
      if (image.backing === undefined || own.has(image.path) || !paths.has(image.backing)) continue;
      throw new FsError(
        'EBUSY',
        `${image.path}: stands on ${basename(image.backing)}, which the merge would change under it; rebase or merge that one first`,
      );
    }
  }
}

/** The same file with tables of its own for writing. @throws FsError EBUSY, EROFS, EIO */
function openForWriting({ path, file, data, below, qcow2 }: Layer): Layer {
  if (file.readOnly) throw new FsError('EROFS', `${path}: may not be written on the host`);
  lockImage(file.fd, path, 'write', 'read');
  if (qcow2 === undefined) return new Layer({ path, file }, undefined, below);
  if (qcow2.header.corrupt)
    throw new FsError('EROFS', `${path}: is marked corrupt; run vdskfs check --repair all on it`);
  if (isMarked(qcow2.header)) {
    rebuildRefcounts(file, qcow2.header);
    unmark(file);
  }
  const header = readHeader(file);
  const written = data === undefined ? undefined : reopenForWriting(data);
  const files = { path, file, data: written };
  const snapshots = snapshotList(header, readSnapshotTable(file, header));
  return new Layer(
    files,
    loadImage(files, header, snapshots, { writable: true, cacheBytes: DEFAULT_CACHE_BYTES }),
    below,
  );
}

/** The lock on the old descriptor would stand in the way of the new one's. */
function reopenForWriting(data: HostFile): HostFile {
  data[Symbol.dispose]();
  const file = HostFile.open(data.path, { readOnly: false });
  try {
    lockImage(file.fd, file.path, 'write');
    return file;
  } catch (error) {
    file[Symbol.dispose]();
    throw error;
  }
}

/** Everything goes into `target`, the lowest layer first. Durable when it resolves. */
async function commit(
  top: Layer,
  between: readonly Layer[],
  target: CommitTarget,
  progress: (fraction: number) => void,
  signal: AbortSignal | undefined,
): Promise<void> {
  const size = top.virtualSize;
  if (target.size() < size) await target.grow(size);
  const layers = [...between.toReversed(), top];
  for (const [index, layer] of layers.entries()) {
    const show = (part: number): void => progress((index + part) / layers.length);
    const options = { progress: show, ...(signal === undefined ? {} : { signal }) };
    await inSteps(commitAll(layer.image, clipped(target, size)), options);
    // What a shorter layer hid behind its end.
    const end = Math.min(size, target.size());
    if (layer !== top && layer.virtualSize < end) target.zero(layer.virtualSize, end - layer.virtualSize);
  }
  target.flush();
}

/** Without what lies behind the end of the overlay: nobody has ever seen that through it. */
const clipped = (target: CommitTarget, size: number): CommitTarget => ({
  ...target,
  write: (source, at, length, offset) => {
    if (offset < size) target.write(source, at, Math.min(length, size - offset), offset);
  },
  zero: (offset, length) => {
    if (offset < size) target.zero(offset, Math.min(length, size - offset));
  },
});

function switchBacking(top: Layer, base: Layer): void {
  top.follow(base);
  top.image.lock();
  try {
    writeBacking(top.file, { file: recordedName(top.path, base.path), format: base.format });
  } finally {
    top.image.unlock();
  }
}

/** What the overlay had is below now: it keeps nothing of its own. The header switches to a table without entries. */
async function empty(top: Layer, progress: (fraction: number) => void): Promise<void> {
  const { image, snapshots } = top.qcow2 as NonNullable<Layer['qcow2']>;
  const nothing = newSnapshotEntry({
    l1TableOffset: 0,
    l1Entries: 0,
    id: '',
    name: '',
    seconds: 0,
    nanoseconds: 0,
    virtualSize: image.virtualSize(),
  });
  await applySnapshot(image, nothing, progress);
  try {
    if (image.geometry.externalData) image.data.punch(0, image.data.size());
    // The new table came to lie behind what is free now.
    await compactImage(image, snapshots, { progress: () => {} });
  } catch (error) {
    // It is merged, and whole: only the file is longer than it need be.
    if (!(error instanceof FsError)) throw error;
  }
}

/**
 * Overlays that are external checkpoints of a disk: the disk deletes the checkpoints, which merges each with what is below
 * it, the lowest first. Names and links are mended as it does that.
 */
async function mergeCheckpoints(
  imagePath: string,
  into: string | undefined,
  { backingRoots = [] }: MergeOptions,
  { progress = () => {}, signal }: Work,
): Promise<Merged> {
  const { overlays, base } = await checkpointsDown(imagePath, into);
  const disk = await openDisk(imagePath, { readOnly: false, backingRoots });
  try {
    for (const [index, overlay] of overlays.entries()) {
      const checkpoint = disk.checkpoints().find(({ id }) => id === overlay);
      if (checkpoint === undefined) {
        throw new FsError('EBUSY', `${overlay}: is an overlay that a roll back made; merge it with its disk mounted`);
      }
      const following = setInterval(() => {
        progress((index + (disk.operation()?.progress ?? 0)) / overlays.length);
      }, PROGRESS_MS);
      try {
        await disk.deleteCheckpoint(checkpoint, signal === undefined ? {} : { signal });
      } finally {
        clearInterval(following);
      }
    }
  } finally {
    await disk.close();
  }
  return { base, removed: overlays.toReversed().filter((overlay) => !existsSync(overlay)) };
}

const PROGRESS_MS = 200;

/** The overlays from the image down to the base, lowest first. @throws FsError EINVAL, EBUSY */
async function checkpointsDown(
  imagePath: string,
  into: string | undefined,
): Promise<{ readonly overlays: string[]; readonly base: string }> {
  const scan = new FolderScan();
  const overlays: string[] = [];
  for (let path = imagePath; ; ) {
    const image = await scan.image(path);
    if (image?.backing === undefined || overlays.includes(path)) {
      throw new FsError('EINVAL', `${into}: is none of the files that ${imagePath} stands on (vdskfs info --chain)`);
    }
    if (image.mark === undefined) {
      throw new FsError(
        'EBUSY',
        `${path}: is no checkpoint of the disk that ${imagePath} belongs to; merge into it first`,
      );
    }
    overlays.unshift(path);
    path = image.backing;
    if (into === undefined || path === into) return { overlays, base: path };
  }
}
