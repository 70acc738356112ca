/** snapshots/NAME and overlays/NAME: what the disk held when the checkpoint was taken. */
import { statSync } from 'node:fs';
import type { Checkpoint } from '../disk/disk.ts';
import { FsError } from '../errors.ts';
import type { Attributes, DirectoryEntry, Node } from '../fuse/filesystem.ts';
import { folderOf } from './checkpoint-kind.ts';
import type { SharedOpening } from './data-threads.ts';
import { ImageFile } from './image-file.ts';
import { checkpointInfoText } from './info-json.ts';
import type { MountedDisk } from './mounted-disk.ts';
import { Directory, directoryAttributes, type InodeNumbers, LASTING_MS } from './node.ts';
import type { Partition } from './partition-table/partition.ts';
import { PartitionsDirectory, partitionsOf } from './partitions-directory.ts';
import { TextFile } from './text-file.ts';

/** partitions/ is its one subdirectory. */
const SUBDIRECTORIES = 1;

/** Nothing of it exists before it is looked into: a listing of many checkpoints stays cheap. */
export class CheckpointDirectory extends Directory {
  /** Its name may be given to another any time. */
  override readonly entryValidMs = 0;
  override readonly attributesValidMs = LASTING_MS;
  readonly #mounted: MountedDisk;
  readonly #inodes: InodeNumbers;
  #checkpoint: Checkpoint;
  #gone = false;
  #entries: ReadonlyMap<string, Node> | undefined;

  constructor(mounted: MountedDisk, inodes: InodeNumbers, parentIno: number, checkpoint: Checkpoint) {
    const path = () => `${mounted.disk.name}/${folderOf[checkpoint.kind]}/${this.#checkpoint.name}`;
    super({ ino: inodes.next(), path, report: (error) => mounted.report(error) }, parentIno);
    this.#mounted = mounted;
    this.#inodes = inodes;
    this.#checkpoint = checkpoint;
  }

  /** @throws FsError ENOENT after it was deleted */
  get checkpoint(): Checkpoint {
    if (this.#gone) throw new FsError('ENOENT', `Checkpoint ${JSON.stringify(this.#checkpoint.name)} was deleted.`);
    return this.#checkpoint;
  }

  /** As the list of the disk has it now; another object after a rename. */
  follow(checkpoint: Checkpoint): void {
    this.#checkpoint = checkpoint;
  }

  /** It is in the disk's list no more. */
  markGone(): void {
    this.#gone = true;
  }

  override async attributes(): Promise<Attributes> {
    return directoryAttributes({ permissions: 0o555, timeMs: this.checkpoint.createdMs }, SUBDIRECTORIES);
  }

  override async lookup(name: string): Promise<Node> {
    const node = this.#look().get(name);
    if (node === undefined) throw this.absent(name);
    return node;
  }

  override async list(): Promise<readonly DirectoryEntry[]> {
    return Array.from(this.#look(), ([name, node]) => ({ name, node }));
  }

  /** @throws FsError ENOENT after it was deleted */
  #look(): ReadonlyMap<string, Node> {
    const { kind, virtualSize, stateFiles } = this.checkpoint;
    if (this.#entries !== undefined) return this.#entries;
    const mounted = this.#mounted;
    const inodes = this.#inodes;
    const checkpoint = () => this.checkpoint;
    const timeMs = () => this.#checkpoint.createdMs;
    const label = (file: string) => () => `${folderOf[kind]}/${this.#checkpoint.name}/${file}`;
    const allocatedBytes = () => mounted.disk.allocatedBytes(this.checkpoint);
    const opening = mounted.opening(() => mounted.disk.openCheckpoint(this.checkpoint));
    const shared = { mounted, opening, timeMs, checkpoint, kind: 'checkpoint' } as const;

    const diskFile = new ImageFile({
      ...shared,
      ino: inodes.next(),
      label: label('disk.raw'),
      base: 0,
      length: virtualSize,
      size: () => virtualSize,
      allocatedBytes,
    });
    let table: readonly Partition[] | undefined;
    const partitions = new PartitionsDirectory(
      { ino: inodes.next(), path: () => `${this.place.path()}/partitions`, report: this.place.report },
      this.ino,
      {
        timeMs,
        table: () => (table ??= readTable(opening)),
        file: ({ number, start, length }) =>
          new ImageFile({
            ...shared,
            ino: inodes.next(),
            label: label(`partitions/${number}.raw`),
            base: start,
            length,
            size: () => length,
            allocatedBytes: () => shareOf(allocatedBytes(), length, virtualSize),
          }),
      },
    );
    const info = new TextFile({
      ino: inodes.next(),
      path: () => `${this.place.path()}/info.json`,
      text: () => checkpointInfoText(this.checkpoint, mounted.disk.details(this.checkpoint)),
      timeMs,
      enter: () => mounted.openFiles.add({ label: label('info.json')(), checkpoint, writes: undefined }),
    });
    const entries = new Map<string, Node>([
      ['disk.raw', diskFile],
      ['partitions', partitions],
      ['info.json', info],
    ]);
    if (kind === 'external') {
      const hostBytes = () => statSync(this.checkpoint.id).size;
      const overlay = new ImageFile({
        ...shared,
        ino: inodes.next(),
        label: label('overlay.qcow2'),
        opening: mounted.opening(() => mounted.disk.openOverlay(this.checkpoint)),
        base: 0,
        length: Number.POSITIVE_INFINITY,
        size: hostBytes,
        allocatedBytes: () => statSync(this.checkpoint.id).blocks * 512,
        changing: true,
      });
      entries.set('overlay.qcow2', overlay);
    }
    for (const { name, bytes, allocatedBytes: allocated } of stateFiles) {
      const file = new ImageFile({
        ...shared,
        ino: inodes.next(),
        label: label(name),
        opening: mounted.opening(() => mounted.disk.openState(this.checkpoint, name)),
        base: 0,
        length: bytes,
        size: () => bytes,
        allocatedBytes: () => allocated,
      });
      entries.set(name, file);
    }
    this.#entries = entries;
    return entries;
  }
}

function readTable(opening: SharedOpening): readonly Partition[] {
  const { contents } = opening.acquire();
  try {
    return partitionsOf(contents);
  } finally {
    opening.release();
  }
}

/**
 * Allocated bytes of a partition: its share of the disk's, by size. Exact only if the data is spread evenly, since the
 * truth would cost a walk over all tables at each stat; but cheap, summing up to no more than the disk's, and below the
 * size wherever the disk has holes, which is what makes cp look for them.
 */
export const shareOf = (allocatedBytes: number, length: number, diskBytes: number): number =>
  diskBytes === 0 ? 0 : Math.min(length, Math.floor((allocatedBytes / diskBytes) * length));
