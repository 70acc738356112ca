/** What all nodes of the tree share: inode numbers, attributes, and the refusal of what a node does not do. */
import { constants } from 'node:fs';
import { FsError } from '../errors.ts';
import type {
  AttributeChange,
  Attributes,
  Caller,
  DirectoryEntry,
  DirectoryNode,
  FileNode,
  Node,
  OpenFile,
} from '../fuse/filesystem.ts';

/** For what never changes while mounted. Milliseconds. */
export const LASTING_MS = 3_600_000;

export const ROOT_INO = 1;

/** Gives each node its number; none is given twice. */
export class InodeNumbers {
  #last = ROOT_INO;
  next(): number {
    return ++this.#last;
  }
}

const owner = { uid: process.getuid?.() ?? 0, gid: process.getgid?.() ?? 0 };

interface Shape {
  readonly permissions: number;
  readonly timeMs: number;
}

const times = (timeMs: number) => ({ atimeMs: timeMs, mtimeMs: timeMs, ctimeMs: timeMs });

export function directoryAttributes({ permissions, timeMs }: Shape, subdirectories: number): Attributes {
  const mode = constants.S_IFDIR | permissions;
  return { mode, nlink: 2 + subdirectories, ...owner, size: 0, allocatedBytes: 0, ...times(timeMs) };
}

export function fileAttributes({ permissions, timeMs }: Shape, size: number, allocatedBytes: number): Attributes {
  return { mode: constants.S_IFREG | permissions, nlink: 1, ...owner, size, allocatedBytes, ...times(timeMs) };
}

/** O_WRONLY or O_RDWR. */
export const opensForWriting = (flags: number): boolean => (flags & (constants.O_WRONLY | constants.O_RDWR)) !== 0;

/** Modes and owners are the tree's, not the users'. @throws FsError EPERM */
export function refuseOwnership(change: AttributeChange, path: string): void {
  if (change.mode !== undefined) throw new FsError('EPERM', `The mode of ${path} cannot be changed: the tree sets it.`);
  if (change.uid !== undefined || change.gid !== undefined) {
    throw new FsError('EPERM', `The owner of ${path} cannot be changed: it is whoever mounted.`);
  }
}

/** What `createFile` answers with. */
export interface FileCreated {
  readonly node: FileNode;
  readonly open: OpenFile;
}

/** Where a node stands, and who hears of what it refuses. */
export interface Place {
  readonly ino: number;
  /** From the root of the tree, for messages. A function: checkpoints are renamed. */
  readonly path: () => string;
  /** Keep the sentence for whoever asks why. Returns the error, to be thrown. */
  readonly report: (error: FsError) => FsError;
}

/** A directory in which nothing can be made, removed or renamed, until a subclass says otherwise. */
export abstract class Directory implements DirectoryNode {
  readonly kind = 'directory';
  readonly ino: number;
  readonly parentIno: number;
  readonly attributesValidMs: number = 0;
  readonly entryValidMs: number = LASTING_MS;
  protected readonly place: Place;

  constructor(place: Place, parentIno: number) {
    this.ino = place.ino;
    this.parentIno = parentIno;
    this.place = place;
  }

  abstract attributes(): Promise<Attributes>;
  abstract lookup(name: string): Promise<Node>;
  abstract list(): Promise<readonly DirectoryEntry[]>;

  async setAttributes(change: AttributeChange, _caller: Caller): Promise<void> {
    refuseOwnership(change, this.place.path());
    if (change.size !== undefined) throw new FsError('EISDIR', `${this.place.path()} is a directory: it has no size.`);
    throw new FsError('EPERM', `The times of ${this.place.path()} cannot be changed: the tree sets them.`);
  }

  async makeDirectory(name: string, _caller: Caller): Promise<Node> {
    throw this.#refusal(`${JSON.stringify(name)} cannot be made`);
  }

  async removeDirectory(name: string, _caller: Caller): Promise<void> {
    throw this.#refusal(`${JSON.stringify(name)} cannot be removed`);
  }

  async createFile(name: string, _flags: number, _mode: number, _caller: Caller): Promise<FileCreated> {
    throw this.#refusal(`The file ${JSON.stringify(name)} cannot be made`);
  }

  async unlink(name: string, _caller: Caller): Promise<void> {
    throw this.#refusal(`${JSON.stringify(name)} cannot be removed`);
  }

  async rename(
    name: string,
    _target: DirectoryNode,
    _newName: string,
    _noReplace: boolean,
    _caller: Caller,
  ): Promise<void> {
    throw this.#refusal(`${JSON.stringify(name)} cannot be renamed or moved`);
  }

  protected absent(name: string): FsError {
    return new FsError('ENOENT', `There is no ${JSON.stringify(name)} in ${this.place.path()}.`);
  }

  #refusal(what: string): FsError {
    return this.place.report(
      new FsError(
        'EPERM',
        `${what} in ${this.place.path()}: checkpoints are taken, deleted and renamed in DISK/snapshots and DISK/overlays only.`,
      ),
    );
  }
}

/** A directory whose entries stay as they are. */
export class FixedDirectory extends Directory {
  readonly #entries: ReadonlyMap<string, Node>;
  readonly #timeMs: () => number;
  readonly #hidden: ReadonlyMap<string, Node>;

  /** @param hidden found by their names, but not listed */
  constructor(
    place: Place,
    parentIno: number,
    entries: ReadonlyMap<string, Node>,
    timeMs: () => number,
    hidden: ReadonlyMap<string, Node> = new Map(),
  ) {
    super(place, parentIno);
    this.#entries = entries;
    this.#timeMs = timeMs;
    this.#hidden = hidden;
  }

  override async attributes(): Promise<Attributes> {
    let subdirectories = 0;
    for (const node of this.#entries.values()) if (node.kind === 'directory') subdirectories++;
    return directoryAttributes({ permissions: 0o555, timeMs: this.#timeMs() }, subdirectories);
  }

  override async lookup(name: string): Promise<Node> {
    const node = this.#entries.get(name) ?? this.#hidden.get(name);
    if (node === undefined) throw this.absent(name);
    return node;
  }

  override async list(): Promise<readonly DirectoryEntry[]> {
    return Array.from(this.#entries, ([name, node]) => ({ name, node }));
  }
}
