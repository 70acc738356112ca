/** The mounted tree (INTERFACE.md section 1): a README and one directory per disk. */
import { type StatsFs, statfsSync } from 'node:fs';
import { dirname } from 'node:path';
import type { Disk } from '../disk/disk.ts';
import { FsError } from '../errors.ts';
import type { DirectoryNode, FileSystem, FileSystemStatus, Node, Notifier } from '../fuse/filesystem.ts';
import { fsErrorFrom } from '../os/errno.ts';
import { DataThreads } from './data-threads.ts';
import { createDiskDirectory, type DiskDirectory } from './disk-directory.ts';
import { Machine, type MachineOptions } from './machine.ts';
import { FixedDirectory, InodeNumbers, ROOT_INO } from './node.ts';
import { readmeText } from './readme.ts';
import { TextFile } from './text-file.ts';

/** st_blksize, and what a loop device on a file of the tree takes for the granularity of its discards. */
const BLOCK_BYTES = 4096;

const README = 'README';

const WITHOUT_GUEST: MachineOptions = {
  find: async () => undefined,
  remembered: async () => {
    throw new FsError('ENOTSUP', 'No guest was given for this disk.');
  },
  timeoutMs: 0,
  mountpoint: '',
};

export interface TreeOptions {
  /**
   * How long an operation waits for files that are in its way to be released before it fails with EBUSY; see
   * `OpenFiles`. Default 250 ms.
   */
  readonly releaseGraceMs?: number;
  /** Guests, each with the names of its disks. What is in none of them has no guest. */
  readonly machines?: readonly (MachineOptions & { readonly disks: readonly string[] })[];
}

/** Stands on the disks, and neither opens nor closes them. */
export class Tree implements FileSystem {
  readonly root: DirectoryNode;
  readonly dataThreads: DataThreads;
  readonly #disks: readonly Disk[];
  readonly #directories: DiskDirectory[] = [];
  #notifier: Notifier | undefined;

  constructor(disks: readonly Disk[], { releaseGraceMs = 250, machines = [] }: TreeOptions) {
    const inodes = new InodeNumbers();
    const mountedMs = Date.now();
    refuseSharedNames(disks);
    this.#disks = disks;
    this.dataThreads = new DataThreads();
    const readme = new TextFile({
      ino: inodes.next(),
      path: () => README,
      text: () => readmeText(disks[0]?.name ?? 'DISK'),
      timeMs: () => mountedMs,
    });
    const entries = new Map<string, Node>([[README, readme]]);
    const byDisk = new Map<string, Machine>();
    for (const options of machines) {
      const machine = new Machine(options);
      for (const name of options.disks) byDisk.set(name, machine);
    }
    try {
      for (const disk of disks) {
        const { dataThreads: threads } = this;
        const notifier = () => this.#notifier;
        const directory = createDiskDirectory({
          disk,
          inodes,
          releaseGraceMs,
          threads,
          notifier,
          machine: byDisk.get(disk.name) ?? new Machine(WITHOUT_GUEST),
        });
        this.#directories.push(directory);
        entries.set(disk.name, directory.node);
      }
    } catch (error) {
      this.close();
      throw error;
    }
    this.root = new FixedDirectory(
      {
        ino: ROOT_INO,
        path: () => 'the root of the mount',
        report: (error) => error,
      },
      ROOT_INO,
      entries,
      () => mountedMs,
    );
  }

  attachNotifier(notifier: Notifier): void {
    this.#notifier = notifier;
  }

  /** Of the host's file system with the first image: that is where space runs out. */
  async status(): Promise<FileSystemStatus> {
    const image = this.#disks[0]?.imagePath;
    const host = statfsOf(image === undefined ? '/' : dirname(image));
    const checkpoints = this.#disks.reduce((sum, disk) => sum + disk.checkpoints().length, 0);
    return {
      blockBytes: BLOCK_BYTES,
      totalBytes: host.blocks * host.bsize,
      freeBytes: host.bfree * host.bsize,
      availableBytes: host.bavail * host.bsize,
      files: 1 + this.#disks.length + checkpoints,
    };
  }

  /** Let go of the disks, after the file system was unmounted; closing them is the next step of whoever opened them. */
  close(): void {
    for (const directory of this.#directories) directory.close();
    this.dataThreads.close();
  }
}

function statfsOf(folder: string): StatsFs {
  try {
    return statfsSync(folder);
  } catch (error) {
    throw fsErrorFrom(error, `cannot ask for the free space of ${folder}`);
  }
}

function refuseSharedNames(disks: readonly Disk[]): void {
  const taken = new Set([README]);
  for (const { name, imagePath } of disks) {
    if (taken.has(name)) {
      throw new FsError(
        'EEXIST',
        `${imagePath} cannot be mounted here: the name ${JSON.stringify(name)} is taken in this tree; rename the file or mount it elsewhere.`,
      );
    }
    taken.add(name);
  }
}

/** @throws FsError EEXIST when two disks would have the same name */
export const createTree = (disks: readonly Disk[], options: TreeOptions = {}): Tree => new Tree(disks, options);
