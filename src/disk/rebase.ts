/**
 * Another backing file for an image, and the same contents: what the new one would change is copied into the image first.
 * Until the header names the new one, in one write, the image reads the same over the old one; so a rebase may be broken
 * off at any moment, by an abort, a crash or a full disk, and be done again.
 */
import { Buffer } from 'node:buffer';
import { existsSync, realpathSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { FsError } from '../errors.ts';
import { differences } from '../qcow2/difference.ts';
import { keepHidden } from '../qcow2/discard.ts';
import { flush } from '../qcow2/flush.ts';
import { writeBacking } from '../qcow2/header-update.ts';
import type { Backing, Image } from '../qcow2/image.ts';
import { closeImage } from '../qcow2/open-image.ts';
import { imageLayer, ownExtents } from '../qcow2/own-extents.ts';
import { fillIn } from '../qcow2/pull-up.ts';
import type { SnapshotEntry } from '../qcow2/snapshot-table.ts';
import { readSnapshotL1 } from '../qcow2/snapshots.ts';
import { inSteps, type Steps } from '../qcow2/steps.ts';
import { asWriter } from '../qcow2/write.ts';
import type { Work } from './disk.ts';
import type { Layer } from './layer.ts';
import { momentOf } from './moments.ts';
import { openBacking, openChain } from './open-chain.ts';
import { DEFAULT_CACHE_BYTES } from './open-disk.ts';
import { recordedName } from './overlay.ts';

/** Compared at a time; a multiple of every cluster size. */
const PIECE_BYTES = 2 ** 21;

/**
 * @param backing the new backing file, as it is given: relative to the image's folder, or else to the working directory;
 * undefined: none, the image stands alone afterwards
 * @throws FsError EBUSY for an image whose checkpoints would change, or that is in use; EINVAL, ENOENT, ENOSPC, EIO
 */
export async function rebaseImage(path: string, backing: string | undefined, work: Work = {}): Promise<void> {
  const imagePath = realpathSync(path);
  const below = backing === undefined ? undefined : await openNew(imagePath, located(imagePath, backing));
  try {
    const { top, unwritable } = await openChain(imagePath, { readOnly: false, cacheBytes: DEFAULT_CACHE_BYTES });
    try {
      if (unwritable !== undefined) throw new FsError('EROFS', `${path}: cannot be changed: ${unwritable}`);
      refuseDependent(top, below);
      await fillIfNeeded(top, below, work);
      flush(top.image);
      const recorded =
        below === undefined ? undefined : { file: recordedName(imagePath, below.path), format: below.format };
      top.image.lock();
      try {
        writeBacking(top.file, recorded);
      } finally {
        top.image.unlock();
      }
    } finally {
      try {
        if (unwritable === undefined) closeImage(top.image);
      } finally {
        dispose(top);
      }
    }
  } finally {
    if (below !== undefined) dispose(below);
  }
}

const dispose = (top: Layer): void => {
  for (const layer of top.chain) layer[Symbol.dispose]();
};

function located(imagePath: string, name: string): string {
  const beside = resolve(dirname(imagePath), name);
  return existsSync(beside) ? beside : resolve(name);
}

/** Everything that the image is to stand on, for reading. */
async function openNew(imagePath: string, backingPath: string): Promise<Layer> {
  const loop = (): FsError =>
    new FsError('EINVAL', `${imagePath}: cannot stand on ${backingPath}, which is made of the image itself`);
  const real = existsSync(backingPath) ? realpathSync(backingPath) : backingPath;
  if (real === imagePath) throw loop();
  const top = await openBacking(real, DEFAULT_CACHE_BYTES);
  if (!top.chain.some((layer) => layer.path === imagePath)) return top;
  dispose(top);
  throw loop();
}

/** Refuse what would make a checkpoint show something else. */
function refuseDependent(top: Layer, below: Layer | undefined): void {
  if (top.mark !== undefined) {
    throw new FsError(
      'EBUSY',
      `${top.path}: is an external checkpoint, which shows the file below it, and would show another; delete it (vdskfs delete --external), or export the disk`,
    );
  }
  const size = Math.max(top.below?.virtualSize ?? 0, below?.virtualSize ?? 0);
  const { image, snapshots } = top.qcow2 as NonNullable<Layer['qcow2']>;
  const dependent = snapshots.entries.filter((entry) => showsBelow(image, entry, size));
  if (dependent.length === 0) return;
  const names = dependent.map(({ name }) => JSON.stringify(name)).join(', ');
  throw new FsError(
    'EBUSY',
    `${top.path}: its checkpoints ${names} show what is in the backing file, and would change with it; delete them first, or export them`,
  );
}

/** Whether a snapshot has a hole below `size` through which the backing file shows. */
function showsBelow(image: Image, entry: SnapshotEntry, size: number): boolean {
  if (entry.problem !== undefined) return false;
  const layer = imageLayer(image, readSnapshotL1(image, entry), entry.virtualSize);
  for (const { kind } of ownExtents(layer, 0, Math.min(size, entry.virtualSize))) {
    if (kind === 'unallocated') return true;
  }
  return false;
}

async function fillIfNeeded(top: Layer, below: Layer | undefined, { progress, signal }: Work): Promise<void> {
  const { image } = top.qcow2 as NonNullable<Layer['qcow2']>;
  keepHidden(image);
  const options = { ...(progress === undefined ? {} : { progress }), ...(signal === undefined ? {} : { signal }) };
  await inSteps(fill(top, image, below), options);
}

function* fill(top: Layer, image: Image, below: Layer | undefined): Steps {
  // Files are known by their paths here: both chains may have some of them.
  const byPath = (layer: Layer | undefined) =>
    layer === undefined
      ? []
      : momentOf(layer).map(({ layer: own, file }) => ({ layer: own, file: (file as Layer).path }));
  const changed = yield* differences(byPath(below), byPath(top.below));
  const size = image.virtualSize();
  const { unitBytes } = image.geometry;
  const [before, after] = [new Uint8Array(PIECE_BYTES), new Uint8Array(PIECE_BYTES)];
  let position = 0;
  for (const { offset, length } of changed) {
    const end = Math.min(size, Math.ceil((offset + length) / unitBytes) * unitBytes);
    for (position = Math.max(position, offset - (offset % unitBytes)); position < end; ) {
      const next = Math.min(end, position + PIECE_BYTES);
      for (const extent of ownExtents(imageLayer(image), position, next - position)) {
        if (extent.kind !== 'unallocated') continue;
        read(top.below?.backing, before, extent.offset, extent.length);
        read(below?.backing, after, extent.offset, extent.length);
        for (const { from, to } of unequalUnits(before, after, extent.length, unitBytes)) {
          fillRange(image, below?.backing, before, extent.offset + from, extent.offset + to);
        }
      }
      position = next;
      yield position / size;
    }
  }
}

/** `before` is free to be used. */
function fillRange(image: Image, base: Backing | undefined, before: Uint8Array, from: number, to: number): void {
  const buffer = before.slice(0, to - from);
  const written = asWriter(image, from, to, () => {
    fillIn(image, base, buffer, from, to);
  });
  if (!written) throw new FsError('EBUSY', `${image.file.path} is being changed by another operation`);
}

function read(backing: Backing | undefined, target: Uint8Array, offset: number, length: number): void {
  const there = backing === undefined ? 0 : Math.max(0, Math.min(length, backing.size() - offset));
  if (there > 0) backing?.read(target, 0, there, offset);
  target.fill(0, there, length);
}

/** Runs of units in which the first `length` bytes differ. */
function* unequalUnits(
  a: Uint8Array,
  b: Uint8Array,
  length: number,
  unitBytes: number,
): Generator<{ readonly from: number; readonly to: number }, void> {
  const differs = (at: number): boolean => {
    const end = Math.min(length, at + unitBytes);
    return Buffer.compare(a.subarray(at, end), b.subarray(at, end)) !== 0;
  };
  for (let from = 0; from < length; ) {
    let to = from;
    while (to < length && differs(to)) to += unitBytes;
    if (to > from) yield { from, to: Math.min(length, to) };
    from = to + unitBytes;
  }
}
