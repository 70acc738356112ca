/** What `export` copies: the disk of an image file or of a mount, as it is now or at a checkpoint. */
import { join } from 'node:path';
import type { Source } from '../disk/copy-out.ts';
import type { Disk } from '../disk/disk.ts';
import { FsError } from '../errors.ts';
import { HostFile } from '../storage/host-file.ts';
import type { CheckpointPath } from './checkpoint-path.ts';
import { findCheckpoint, withDisk } from './image-target.ts';
import { type ListedCheckpoint, type Listing, listingOf } from './listing.ts';
import { mountedTarget } from './mounted-target.ts';
import { mountedDisk } from './target.ts';

/** Run `action` on bytes that do not change meanwhile. */
export async function withSource<T>(
  { path, name }: CheckpointPath,
  action: (source: Source) => Promise<T>,
): Promise<T> {
  const directory = mountedDisk(path);
  if (directory !== undefined) return withMounted(directory, name, action);
  return withDisk(path, { readOnly: true }, async (disk) => {
    using opened = name === undefined ? disk.openLive() : disk.openCheckpoint(findCheckpoint(disk as Disk, name));
    return await action(opened.contents);
  });
}

async function withMounted<T>(
  directory: string,
  name: string | undefined,
  action: (source: Source) => Promise<T>,
): Promise<T> {
  const listing = await listingOf(directory);
  if (name !== undefined) {
    using file = HostFile.open(checkpointFile(directory, listing, name), { readOnly: true });
    return await action(fileSource(file));
  }
  if (listing.owner === 'attached') {
    throw new FsError(
      'EBUSY',
      `${directory}: a running guest writes the image itself, so that what is read of it belongs to no one moment; take a checkpoint and export that`,
    );
  }
  if (listing.readOnly != null) {
    using file = HostFile.open(join(directory, 'disk.raw'), { readOnly: true });
    return await action(fileSource(file));
  }
  return withMoment(directory, action);
}

/** disk.raw of a checkpoint of a mounted disk. @throws FsError ENOENT */
function checkpointFile(directory: string, { snapshots, overlays }: Listing, name: string): string {
  const by = (key: 'name' | 'realName') => (one: ListedCheckpoint) => one[key] === name;
  for (const key of ['name', 'realName'] as const) {
    const internal = snapshots.find(by(key));
    if (internal !== undefined) return join(directory, 'snapshots', internal.name, 'disk.raw');
    const external = overlays.find(by(key));
    if (external !== undefined) return join(directory, 'overlays', external.name, 'disk.raw');
  }
  throw new FsError('ENOENT', `${directory}: no checkpoint is named ${JSON.stringify(name)}; \`vdskfs ls\` lists them`);
}

/**
 * A disk that a guest goes on writing: a checkpoint holds the moment for as long as it is read. Where the format has no
 * checkpoints, the disk is held open for writing, which keeps others from writing it.
 */
async function withMoment<T>(directory: string, action: (source: Source) => Promise<T>): Promise<T> {
  const name = `vdskfs-export-${process.pid}`;
  const target = mountedTarget(directory);
  try {
    await target.takeCheckpoint(name);
  } catch (error) {
    if (!(error instanceof FsError && error.errno === 'ENOTSUP')) throw error;
    using file = HostFile.open(join(directory, 'disk.raw'), { readOnly: false });
    return await action(fileSource(file));
  }
  try {
    using file = HostFile.open(join(directory, 'snapshots', name, 'disk.raw'), { readOnly: true });
    return await action(fileSource(file));
  } finally {
    await target.deleteCheckpoint(name);
  }
}

function fileSource(file: HostFile): Source {
  return {
    size: () => file.size(),
    read: (target, at, length, offset) => {
      const got = file.read(target, at, length, offset);
      if (got < length) throw new FsError('EIO', `${file.path}: ends at byte ${offset + got}; the disk has shrunk`);
    },
    nextData: (offset) => file.nextData(offset),
    nextHole: (offset) => file.nextHole(offset),
  };
}
