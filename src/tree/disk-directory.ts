/** The directory of one disk: its live contents, its checkpoints, and what tells of them. */
import type { Disk } from '../disk/disk.ts';
import type { DirectoryNode, Node, Notifier } from '../fuse/filesystem.ts';
import { ByIdDirectory } from './by-id-directory.ts';
import { shareOf } from './checkpoint-directory.ts';
import { CheckpointsDirectory } from './checkpoints-directory.ts';
import { ControlFile } from './control-file.ts';
import type { DataThreads } from './data-threads.ts';
import { ImageFile } from './image-file.ts';
import { IncomingDirectory } from './incoming-directory.ts';
import { diskInfoText } from './info-json.ts';
import type { Machine } from './machine.ts';
import { MountedDisk } from './mounted-disk.ts';
import { FixedDirectory, type InodeNumbers, type Place, ROOT_INO } from './node.ts';
import { PartitionsDirectory, partitionsOf } from './partitions-directory.ts';
import { TextFile } from './text-file.ts';

export interface DiskDirectoryOptions {
  readonly disk: Disk;
  readonly inodes: InodeNumbers;
  readonly threads: DataThreads;
  readonly releaseGraceMs: number;
  /** Undefined until the driver has attached it. */
  readonly notifier: () => Notifier | undefined;
  /** The guest whose disk it is. */
  readonly machine: Machine;
}

export interface DiskDirectory {
  readonly node: DirectoryNode;
  /** Let go of the live contents. */
  close(): void;
}

export function createDiskDirectory({
  disk,
  inodes,
  threads,
  releaseGraceMs,
  notifier,
  machine,
}: DiskDirectoryOptions): DiskDirectory {
  const timeMs = () => disk.modifiedMs();
  const place = (path: string): Place => ({
    ino: inodes.next(),
    path: () => (path === '' ? disk.name : `${disk.name}/${path}`),
    report: (error) => mounted.report(error),
  });
  const here = place('');
  const incoming = new IncomingDirectory(place('.incoming'), here.ino, inodes, threads);
  const mounted = new MountedDisk({ disk, threads, releaseGraceMs, machine, incoming });
  // Held while mounted: the partition table is read at each look into partitions/.
  const { contents } = mounted.live.acquire();
  const live = { mounted, opening: mounted.live, timeMs, checkpoint: () => undefined, kind: 'live' } as const;

  const diskFile = new ImageFile({
    ...live,
    ino: inodes.next(),
    label: () => 'disk.raw',
    base: 0,
    length: Number.POSITIVE_INFINITY,
    size: () => disk.virtualSize(),
    allocatedBytes: () => disk.allocatedBytes(),
  });
  const partitions = new PartitionsDirectory(place('partitions'), here.ino, {
    timeMs,
    table: () => partitionsOf(contents),
    file: ({ number, start, length }) => {
      const size = () => Math.max(0, Math.min(length, disk.virtualSize() - start));
      return new ImageFile({
        ...live,
        ino: inodes.next(),
        label: () => `partitions/${number}.raw`,
        base: start,
        length,
        size,
        allocatedBytes: () => shareOf(disk.allocatedBytes(), size(), disk.virtualSize()),
        passing: true,
      });
    },
  });
  const snapshots = new CheckpointsDirectory(mounted, 'internal', inodes, here.ino);
  const overlays = new CheckpointsDirectory(mounted, 'external', inodes, here.ino);
  const info = new TextFile({
    ino: inodes.next(),
    path: () => `${disk.name}/info.json`,
    text: () => diskInfoText(disk, machine.lastStatus, mounted.operation()),
    timeMs,
    refresh: () => Promise.all([disk.refresh('checkpoints'), machine.status()]),
  });
  const entries = new Map<string, Node>([
    ['disk.raw', diskFile],
    ['partitions', partitions],
    ['snapshots', snapshots],
    ['overlays', overlays],
    ['control', new ControlFile(inodes.next(), mounted)],
    ['info.json', info],
  ]);
  const hidden = new Map<string, Node>([
    ['.incoming', incoming],
    ['.by-id', new ByIdDirectory(place('.by-id'), here.ino, mounted, inodes)],
  ]);

  disk.onLayers(() => threads.republish());
  disk.onChange((change) => {
    const kernel = notifier();
    if (change === 'checkpoints') {
      // Names of checkpoints are looked up each time: none needs to be taken back.
      for (const folder of [snapshots, overlays]) {
        folder.refresh();
        kernel?.invalidateNode(folder.ino);
      }
    } else {
      // sendfile(2) fills the page cache even where reads and writes bypass it.
      for (const file of [diskFile, ...partitions.knownFiles]) kernel?.invalidateNode(file.ino);
    }
    kernel?.invalidateNode(info.ino);
  });

  machine.disks.push(mounted);
  return {
    node: new FixedDirectory(here, ROOT_INO, entries, timeMs, hidden),
    close: () => mounted.live.release(),
  };
}
