/**
 * DISK/.by-id: each checkpoint once more, under a name that is short whatever the checkpoint is called, since bhyve
 * takes no long paths. Not listed in DISK. The names are the same after the disk was mounted anew.
 */
import { crc32 } from 'node:zlib';
import type { Checkpoint } from '../disk/disk.ts';
import type { Attributes, DirectoryEntry, Node } from '../fuse/filesystem.ts';
import { CheckpointDirectory } from './checkpoint-directory.ts';
import type { MountedDisk } from './mounted-disk.ts';
import { Directory, directoryAttributes, type InodeNumbers, type Place } from './node.ts';

/** The ID of an internal checkpoint; of an external one `x` and eight hexadecimal digits. */
export const shortName = ({ kind, id }: Checkpoint): string =>
  kind === 'internal' && /^\w{1,16}$/.test(id) ? id : `x${crc32(id).toString(16).padStart(8, '0')}`;

export class ByIdDirectory extends Directory {
  override readonly entryValidMs = 0;
  readonly #mounted: MountedDisk;
  readonly #inodes: InodeNumbers;
  /** Nodes of their own: a directory cannot stand in two places. */
  readonly #nodes = new WeakMap<Checkpoint, CheckpointDirectory>();

  constructor(place: Place, parentIno: number, mounted: MountedDisk, inodes: InodeNumbers) {
    super(place, parentIno);
    this.#mounted = mounted;
    this.#inodes = inodes;
  }

  override async attributes(): Promise<Attributes> {
    const { disk } = this.#mounted;
    return directoryAttributes({ permissions: 0o555, timeMs: disk.modifiedMs() }, disk.checkpoints().length);
  }

  override async lookup(name: string): Promise<Node> {
    await this.#mounted.disk.refresh('checkpoints');
    const checkpoint = this.#mounted.disk.checkpoints().find((one) => shortName(one) === name);
    if (checkpoint === undefined) throw this.absent(name);
    return this.#node(checkpoint);
  }

  override async list(): Promise<readonly DirectoryEntry[]> {
    return this.#mounted.disk.checkpoints().map((one) => ({ name: shortName(one), node: this.#node(one) }));
  }

  #node(checkpoint: Checkpoint): CheckpointDirectory {
    const known = this.#nodes.get(checkpoint);
    if (known !== undefined) return known;
    const node = new CheckpointDirectory(this.#mounted, this.#inodes, this.ino, checkpoint);
    this.#nodes.set(checkpoint, node);
    return node;
  }
}
