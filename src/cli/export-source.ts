/** What `export` copies: the disk of an image file or of a mount, as it is now or at a checkpoint. */
import { readdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { ByteSpan, Source } from '../disk/copy-out.ts';
import type { Checkpoint, Disk, Work } from '../disk/disk.ts';
import { type EarlierCheckpoint, fileSource } from '../disk/export-backing.ts';
import type { ExportOrigin } from '../disk/export-origin.ts';
import { FsError } from '../errors.ts';
import type { Difference } from '../qcow2/difference.ts';
import { HostFile } from '../storage/host-file.ts';
import type { CheckpointPath } from './checkpoint-path.ts';
import { findCheckpoint, withDisk } from './image-target.ts';
import { type ListedCheckpoint, type Listing, listingOf } from './listing.ts';
import { askDisk, quoted } from './mounted-target.ts';
import { mountedDisk } from './target.ts';

/** Bytes that do not change while they are copied. */
export interface ExportSource {
  readonly source: Source;
  /** Of a checkpoint. */
  readonly origin: ExportOrigin | undefined;
  /** The smallest piece that is known to have changed or not. */
  readonly clusterBytes: number;
  /** What differs from an earlier checkpoint, and that checkpoint for as long as `action` runs. @throws FsError ENOENT */
  withEarlier<T>(
    name: string,
    work: Work,
    action: (changed: readonly ByteSpan[], earlier: EarlierCheckpoint) => Promise<T>,
  ): Promise<T>;
}

export async function withSource<T>(
  { path, name }: CheckpointPath,
  action: (source: ExportSource) => Promise<T>,
): Promise<T> {
  const directory = mountedDisk(path);
  if (directory !== undefined) return withMounted(directory, name, action);
  return withDisk(path, { readOnly: true }, async (disk) => {
    const checkpoint = name === undefined ? undefined : findCheckpoint(disk, name);
    using opened = checkpoint === undefined ? disk.openLive() : disk.openCheckpoint(checkpoint);
    return await action(imageSource(disk, opened.contents, checkpoint));
  });
}

function imageSource(disk: Disk, source: Source, checkpoint: Checkpoint | undefined): ExportSource {
  const originOf = ({ realName, id, createdMs }: Checkpoint): ExportOrigin => ({
    disk: disk.name,
    name: realName,
    id,
    createdMs,
  });
  return {
    source,
    origin: checkpoint === undefined ? undefined : originOf(checkpoint),
    clusterBytes: disk.info().format.clusterSize,
    async withEarlier(name, work, action) {
      const earlier = findCheckpoint(disk, name);
      const changed = await disk.differences(earlier, checkpoint, work);
      using opened = disk.openCheckpoint(earlier);
      const overlay = earlier.kind === 'external' ? earlier.id : undefined;
      return await action(changed.map(spanOf), { origin: originOf(earlier), overlay, contents: opened.contents });
    },
  };
}

const spanOf = ({ offset, length }: Difference): ByteSpan => ({ from: offset, to: offset + length });

async function withMounted<T>(
  directory: string,
  name: string | undefined,
  action: (source: ExportSource) => Promise<T>,
): Promise<T> {
  const listing = await listingOf(directory);
  if (name !== undefined) {
    const { path, checkpoint } = findMounted(directory, listing, name);
    using file = HostFile.open(path, { readOnly: true });
    return await action(mountedSource(directory, listing, file, checkpoint));
  }
  if (listing.owner === 'attached') {
    throw new FsError(
      'EBUSY',
      `${directory}: a running guest writes the image itself, so that what is read of it belongs to no one moment; take a checkpoint and export that`,
    );
  }
  if (listing.readOnly != null) {
    using file = HostFile.open(join(directory, 'disk.raw'), { readOnly: true });
    return await action(mountedSource(directory, listing, file, undefined));
  }
  return withMoment(directory, (file, moment) => action(mountedSource(directory, listing, file, undefined, moment)));
}

/** @param moment the checkpoint that holds the moment of a live disk */
function mountedSource(
  directory: string,
  listing: Listing,
  file: HostFile,
  checkpoint: ListedCheckpoint | undefined,
  moment?: string,
): ExportSource {
  const originOf = ({ name, realName = name, id, created }: ListedCheckpoint): ExportOrigin => ({
    disk: listing.name,
    name: realName,
    id,
    createdMs: Date.parse(created),
  });
  return {
    source: fileSource(file),
    origin: checkpoint === undefined ? undefined : originOf(checkpoint),
    clusterBytes: listing.format.clusterSize,
    async withEarlier(name, _work, action) {
      const { path, kind, checkpoint: earlier } = findMounted(directory, listing, name);
      const later = checkpoint?.name ?? moment;
      const answer = askDisk(directory, 'diff', quoted(earlier.name), ...(later === undefined ? [] : [quoted(later)]));
      using contents = HostFile.open(path, { readOnly: true });
      const overlay = kind === 'overlays' ? earlier.id : undefined;
      return await action((JSON.parse(answer) as Difference[]).map(spanOf), {
        origin: originOf(earlier),
        overlay,
        contents: fileSource(contents),
      });
    },
  };
}

/** A checkpoint of a mounted disk, and its disk.raw. @throws FsError ENOENT */
function findMounted(directory: string, listing: Listing, name: string) {
  for (const key of ['name', 'realName'] as const) {
    for (const kind of ['snapshots', 'overlays'] as const) {
      const checkpoint = listing[kind].find((one) => one[key] === name);
      if (checkpoint !== undefined) {
        return { path: join(directory, kind, checkpoint.name, 'disk.raw'), kind, checkpoint };
      }
    }
  }
  throw new FsError('ENOENT', `${directory}: no checkpoint is named ${JSON.stringify(name)}; \`vdskfs ls\` lists them`);
}

/**
 * A disk that a guest goes on writing: a checkpoint holds the moment for as long as it is read. Where the format has no
 * checkpoints, the disk is held open for writing, which keeps others from writing it.
 */
async function withMoment<T>(
  directory: string,
  action: (file: HostFile, moment: string | undefined) => Promise<T>,
): Promise<T> {
  const name = `vdskfs-export-${process.pid}`;
  try {
    askDisk(directory, 'checkpoint', name, '--no-memory');
  } catch (error) {
    if (!(error instanceof FsError && error.errno === 'ENOTSUP')) throw error;
    using file = HostFile.open(join(directory, 'disk.raw'), { readOnly: false });
    return await action(file, undefined);
  }
  try {
    using file = HostFile.open(join(directory, 'snapshots', name, 'disk.raw'), { readOnly: true });
    return await action(file, name);
  } finally {
    for (const disk of disksWith(directory, name)) askDisk(disk, 'del-checkpoint', name);
  }
}

/** The checkpoint of a disk whose guest has several was taken in each of them. */
function disksWith(directory: string, name: string): string[] {
  const mount = dirname(directory);
  return readdirSync(mount)
    .map((disk) => join(mount, disk))
    .filter((disk) => {
      try {
        return readdirSync(join(disk, 'snapshots')).includes(name);
      } catch {
        return false; // README
      }
    });
}
