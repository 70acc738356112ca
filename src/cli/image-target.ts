/** An image file that is not mounted: opened for one command, changed, closed. */
import type { Checkpoint, CheckpointKind, Disk } from '../disk/disk.ts';
import { FsError } from '../errors.ts';
import { servedImage } from './state.ts';
import type { Target } from './target.ts';
import { uninterrupted } from './uninterrupted.ts';

/** Open the image for writing, run `action`, close it. */
export function withImage(path: string, action: (target: Target) => Promise<void>): Promise<void> {
  return uninterrupted(() => withWritable(path, action));
}

/** As `withImage`, for long work that watches for Ctrl-C itself. */
export function withWritable(path: string, action: (target: Target) => Promise<void>): Promise<void> {
  return withDisk(path, { readOnly: false }, (disk) => {
    if (disk.readOnly !== undefined) {
      throw new FsError('EROFS', `${path}: cannot be changed: ${disk.readOnly}`);
    }
    return action(imageTarget(disk));
  });
}

/** Open a disk, run `action`, close it whatever happens. The action's failure counts before the closing's. */
export async function withDisk<T>(
  path: string,
  options: { readonly readOnly: boolean },
  action: (disk: Disk) => Promise<T>,
): Promise<T> {
  let disk: Disk;
  try {
    const { openDisk } = await import('../disk/open-disk.ts'); // the engine is a lot to load for --help
    disk = await openDisk(path, options);
  } catch (error) {
    throw withMountOf(path, error);
  }
  let result: T;
  try {
    result = await action(disk);
  } catch (error) {
    await disk.close().catch(() => {});
    throw error;
  }
  await disk.close();
  return result;
}

/** A lock that is refused because of one of our own mounts: say which, and what to give instead. */
export function withMountOf(path: string, error: unknown): unknown {
  if (!(error instanceof FsError)) return error;
  if (error.errno !== 'EBUSY' && error.errno !== 'EAGAIN') return error;
  const served = servedImage(path);
  if (served === undefined) return error;
  return new FsError(
    'EBUSY',
    `${path}: mounted by vdskfs (process ${served.pid}); give its directory ${served.directory} instead, or unmount ${served.mountpoint} first`,
    { cause: error },
  );
}

function imageTarget(disk: Disk): Target {
  return {
    async takeCheckpoint(name, { external = false } = {}) {
      await disk.takeCheckpoint(name, { kind: external ? 'external' : 'internal' });
    },
    async deleteCheckpoint(name, { external = false, ...options } = {}) {
      await disk.deleteCheckpoint(findCheckpoint(disk, name, external ? 'external' : 'internal'), options);
      const what = options.discard ? '; what was written since it was taken is discarded' : '';
      return `checkpoint ${JSON.stringify(name)} deleted${what}`;
    },
    async renameCheckpoint(oldName, newName) {
      await disk.renameCheckpoint(findCheckpoint(disk, oldName), newName);
    },
    async rollback(name) {
      await disk.rollback(findCheckpoint(disk, name));
    },
    async resize(bytes, options) {
      await disk.resize(bytes, options);
    },
  };
}

/** The name it is shown under first, else the first whose real name it is. @throws FsError ENOENT */
export function findCheckpoint(
  disk: Pick<Disk, 'imagePath' | 'checkpoints'>,
  name: string,
  kind?: CheckpointKind,
): Checkpoint {
  const all = disk.checkpoints().filter((one) => kind === undefined || one.kind === kind);
  const found = all.find((one) => one.name === name) ?? all.find((one) => one.realName === name);
  if (found !== undefined) return found;
  const kindOf = kind === undefined ? '' : `${kind} `;
  const hint = all.length === 0 ? `it has no ${kindOf}checkpoints` : '`vdskfs ls` lists them';
  throw new FsError('ENOENT', `${disk.imagePath}: no ${kindOf}checkpoint is named ${JSON.stringify(name)}; ${hint}`);
}
