/** snapshots/ and overlays/: the checkpoints of a disk, internal and external. mkdir takes one, rmdir deletes it, mv renames it. */
import type { Checkpoint, CheckpointKind } from '../disk/disk.ts';
import { FsError } from '../errors.ts';
import type { Attributes, Caller, DirectoryEntry, DirectoryNode, Node } from '../fuse/filesystem.ts';
import { CheckpointDirectory } from './checkpoint-directory.ts';
import { folderOf } from './checkpoint-kind.ts';
import { done, type MountedDisk } from './mounted-disk.ts';
import { Directory, directoryAttributes, type InodeNumbers } from './node.ts';

/**
 * What stays the same when a checkpoint is renamed. An ID alone is given again after its snapshot was deleted; that of an
 * external checkpoint is its file's name.
 */
const identity = ({ kind, id, createdMs, vmClockNs, virtualSize }: Checkpoint): string =>
  [createdMs, vmClockNs, virtualSize, kind === 'internal' ? id : ''].join(' ');

export class CheckpointsDirectory extends Directory {
  readonly #mounted: MountedDisk;
  readonly #kind: CheckpointKind;
  readonly #inodes: InodeNumbers;
  /** Only those that someone looked at have a node. */
  #nodes = new Map<Checkpoint, CheckpointDirectory>();
  #byName: ReadonlyMap<string, Checkpoint> = new Map();
  #changedMs: number;
  #stale = true;

  constructor(mounted: MountedDisk, kind: CheckpointKind, inodes: InodeNumbers, parentIno: number) {
    const path = () => `${mounted.disk.name}/${folderOf[kind]}`;
    super({ ino: inodes.next(), path, report: (error) => mounted.report(error) }, parentIno);
    this.#mounted = mounted;
    this.#kind = kind;
    this.#inodes = inodes;
    this.#changedMs = mounted.disk.modifiedMs();
  }

  /** The disk's list has changed. */
  refresh(): void {
    this.#stale = true;
    this.#changedMs = Date.now();
  }

  override async attributes(): Promise<Attributes> {
    await this.#mounted.disk.refresh('checkpoints');
    const permissions = this.#mounted.fixed === undefined ? 0o755 : 0o555;
    return directoryAttributes({ permissions, timeMs: this.#changedMs }, this.#read().size);
  }

  override async lookup(name: string): Promise<Node> {
    await this.#mounted.disk.refresh('checkpoints');
    return this.#node(this.#named(name));
  }

  override async list(): Promise<readonly DirectoryEntry[]> {
    await this.#mounted.disk.refresh('checkpoints');
    return Array.from(this.#read(), ([name, checkpoint]) => ({ name, node: this.#node(checkpoint) }));
  }

  override async makeDirectory(name: string, { signal }: Caller): Promise<Node> {
    let taken: Checkpoint | undefined;
    await this.#mounted.answer(async () => {
      taken = await this.#mounted.take(name, { kind: this.#kind, signal });
      return done.taken(taken);
    });
    this.refresh();
    this.#read();
    return this.#node(taken as Checkpoint);
  }

  override async removeDirectory(name: string, { signal }: Caller): Promise<void> {
    await this.#mounted.answer(async () => {
      const checkpoint = this.#named(name);
      await this.#mounted.delete(checkpoint, { signal });
      return done.deleted(checkpoint);
    });
    this.refresh();
  }

  override async rename(
    name: string,
    target: DirectoryNode,
    newName: string,
    _noReplace: boolean,
    _caller: Caller,
  ): Promise<void> {
    await this.#mounted.answer(async () => {
      const checkpoint = this.#named(name);
      if (target !== this) {
        throw new FsError('EPERM', `Checkpoint ${JSON.stringify(name)} cannot leave ${this.place.path()}.`);
      }
      return done.renamed(name, await this.#mounted.rename(checkpoint, newName));
    });
    this.refresh();
  }

  #named(name: string): Checkpoint {
    const checkpoint = this.#read().get(name);
    if (checkpoint === undefined) throw this.absent(name);
    return checkpoint;
  }

  #node(checkpoint: Checkpoint): CheckpointDirectory {
    const known = this.#nodes.get(checkpoint);
    if (known !== undefined) return known;
    const node = new CheckpointDirectory(this.#mounted, this.#inodes, this.ino, checkpoint);
    this.#nodes.set(checkpoint, node);
    return node;
  }

  /** The checkpoints by name, after a change read anew from the disk: known ones keep their nodes. */
  #read(): ReadonlyMap<string, Checkpoint> {
    if (!this.#stale) return this.#byName;
    const byName = new Map<string, Checkpoint>();
    for (const checkpoint of this.#mounted.disk.checkpoints()) {
      if (checkpoint.kind === this.#kind) byName.set(checkpoint.name, checkpoint);
    }
    const left = new Map(this.#nodes);
    const nodes = new Map<Checkpoint, CheckpointDirectory>();
    const fresh: Checkpoint[] = [];
    for (const checkpoint of byName.values()) {
      const node = left.get(checkpoint);
      if (node === undefined) fresh.push(checkpoint);
      else nodes.set(checkpoint, node);
      left.delete(checkpoint);
    }
    const renamed = new Map(Array.from(left, ([checkpoint, node]) => [identity(checkpoint), node]));
    for (const checkpoint of fresh) {
      const key = identity(checkpoint);
      const node = renamed.get(key);
      if (node === undefined) continue;
      renamed.delete(key);
      node.follow(checkpoint);
      nodes.set(checkpoint, node);
    }
    const kept = new Set(nodes.values());
    for (const node of left.values()) if (!kept.has(node)) node.markGone();
    this.#nodes = nodes;
    this.#byName = byName;
    this.#stale = false;
    return byName;
  }
}
