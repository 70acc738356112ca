/** A tree in memory behind the interface that drivers serve: what the tests mount. */

import { constants } from 'node:os';
import { FsError } from '../../src/errors.ts';
import { DATA_HANDLES, type DataPlane } from '../../src/fuse/data-plane.ts';
import type {
  AttributeChange,
  Attributes,
  Caller,
  DataThreadSource,
  DirectoryEntry,
  DirectoryNode,
  FileNode,
  FileSystem,
  FileSystemStatus,
  Node,
  Notifier,
  OpenFile,
} from '../../src/fuse/filesystem.ts';
import { allocatedBytes, DISK_BYTES, type MemoryDisk, memoryPlane } from './memory-disk.ts';

const S_IFDIR = 0o040000;
const S_IFREG = 0o100000;

/** When everything in the tree was made, unless it changed since. */
export const BORN_MS = 1_700_000_000_123;

interface Times {
  attributesValidMs: number;
  entryValidMs: number;
}

export class MemoryFileSystem implements FileSystem {
  readonly root: MemoryDirectory;
  readonly dataThreads: DataThreadSource | undefined;
  readonly slots = new Set<number>();
  notifier: Notifier | undefined;
  /** Files open now: the driver must bring it to 0 when the mount ends. */
  openFiles = 0;
  /** Callers in the slow directory's mkdir. */
  waiting = 0;
  #nextIno = 1;

  /** `disk.raw` is in the tree from the start; its slots exist if there are `dataThreads`. */
  constructor(disk: MemoryDisk, dataThreads: DataThreadSource | undefined) {
    this.dataThreads = dataThreads;
    this.root = new MemoryDirectory(this, undefined);
    this.root.add('disk.raw', new DiskFile(this, disk));
    this.root.add('hello.txt', new MemoryFile(this, Buffer.from('hello\n'), 'fresh'));
    this.root.add('kept.txt', new MemoryFile(this, Buffer.from('before\n'), 'keep', { attributesValidMs: 3600_000 }));
    this.root.add('slow', new SlowDirectory(this, this.root));
    const many = new MemoryDirectory(this, this.root);
    for (let i = 0; i < 1000; i++) many.add(`entry-${i}`, new MemoryFile(this, Buffer.alloc(0), 'fresh'));
    this.root.add('many', many);
  }

  ino(): number {
    return this.#nextIno++;
  }

  takeSlot(): number | undefined {
    if (this.dataThreads === undefined) return undefined;
    for (let slot = 0; slot < DATA_HANDLES; slot++) {
      if (this.slots.has(slot)) continue;
      this.slots.add(slot);
      return slot;
    }
    return undefined;
  }

  async status(): Promise<FileSystemStatus> {
    return { blockBytes: 4096, totalBytes: 1 << 30, freeBytes: 1 << 29, availableBytes: 1 << 28, files: 7 };
  }

  attachNotifier(notifier: Notifier): void {
    this.notifier = notifier;
  }
}

abstract class MemoryNode {
  readonly ino: number;
  readonly attributesValidMs: number;
  readonly entryValidMs: number;
  protected permissions: number;
  protected uid = process.getuid?.() ?? 0;
  protected gid = process.getgid?.() ?? 0;
  protected changedMs = BORN_MS;
  readonly fileSystem: MemoryFileSystem;

  constructor(fileSystem: MemoryFileSystem, permissions: number, times: Partial<Times> = {}) {
    this.fileSystem = fileSystem;
    this.ino = fileSystem.ino();
    this.permissions = permissions;
    this.attributesValidMs = times.attributesValidMs ?? 0;
    this.entryValidMs = times.entryValidMs ?? 0;
  }

  protected stat(type: number, nlink: number, size: number, allocated: number): Attributes {
    return {
      mode: type | this.permissions,
      nlink,
      uid: this.uid,
      gid: this.gid,
      size,
      allocatedBytes: allocated,
      atimeMs: this.changedMs,
      mtimeMs: this.changedMs,
      ctimeMs: this.changedMs,
    };
  }

  protected change({ mode, uid, gid }: AttributeChange): void {
    if (mode !== undefined) this.permissions = mode & 0o7777;
    if (uid !== undefined) this.uid = uid;
    if (gid !== undefined) this.gid = gid;
  }
}

export class MemoryDirectory extends MemoryNode implements DirectoryNode {
  readonly kind = 'directory';
  readonly parentIno: number;
  readonly entries = new Map<string, MemoryDirectory | MemoryFile | DiskFile>();

  constructor(fileSystem: MemoryFileSystem, parent: MemoryDirectory | undefined) {
    super(fileSystem, 0o755, { entryValidMs: 3600_000 });
    this.parentIno = parent?.ino ?? this.ino;
  }

  add(name: string, node: MemoryDirectory | MemoryFile | DiskFile): void {
    this.entries.set(name, node);
  }

  async attributes(): Promise<Attributes> {
    const below = [...this.entries.values()].filter(({ kind }) => kind === 'directory').length;
    return this.stat(S_IFDIR, 2 + below, 4096, 0);
  }

  async setAttributes(change: AttributeChange): Promise<void> {
    this.change(change);
  }

  async lookup(name: string): Promise<Node> {
    return this.#entry(name);
  }

  async list(): Promise<DirectoryEntry[]> {
    return [...this.entries].map(([name, node]) => ({ name, node }));
  }

  async makeDirectory(name: string, _caller: Caller): Promise<Node> {
    this.#mustBeFree(name);
    const made = new MemoryDirectory(this.fileSystem, this);
    this.add(name, made);
    return made;
  }

  async removeDirectory(name: string): Promise<void> {
    const node = this.#entry(name);
    if (node.kind !== 'directory') throw new FsError('ENOTDIR', `${name} is no directory`);
    if (node.entries.size > 0) throw new FsError('ENOTEMPTY', `${name} is not empty`);
    this.entries.delete(name);
  }

  async createFile(
    name: string,
    flags: number,
    _mode: number,
    _caller: Caller,
  ): Promise<{ node: FileNode; open: OpenFile }> {
    this.#mustBeFree(name);
    const node = new MemoryFile(this.fileSystem, Buffer.alloc(0), 'fresh');
    this.add(name, node);
    return { node, open: await node.open(flags) };
  }

  async unlink(name: string): Promise<void> {
    const node = this.#entry(name);
    if (node.kind === 'directory') throw new FsError('EISDIR', `${name} is a directory`);
    if (node instanceof DiskFile) throw new FsError('EPERM', 'a disk stays');
    this.entries.delete(name);
  }

  async rename(name: string, target: DirectoryNode, newName: string, noReplace: boolean): Promise<void> {
    const node = this.#entry(name);
    if (!(target instanceof MemoryDirectory)) throw new FsError('EXDEV', 'not of this tree');
    if (noReplace && target.entries.has(newName)) throw new FsError('EEXIST', `${newName} exists`);
    this.entries.delete(name);
    target.add(newName, node);
  }

  #entry(name: string): MemoryDirectory | MemoryFile | DiskFile {
    const node = this.entries.get(name);
    if (node === undefined) throw new FsError('ENOENT', `there is no ${name}`);
    return node;
  }

  #mustBeFree(name: string): void {
    if (this.entries.has(name)) throw new FsError('EEXIST', `${name} exists`);
  }
}

/** mkdir waits here until the caller is interrupted. */
class SlowDirectory extends MemoryDirectory {
  override makeDirectory(_name: string, caller: Caller): Promise<Node> {
    this.fileSystem.waiting++;
    return new Promise((_, reject) => {
      const interrupted = (): void => {
        this.fileSystem.waiting--;
        reject(caller.signal.reason);
      };
      if (caller.signal.aborted) interrupted();
      else caller.signal.addEventListener('abort', interrupted, { once: true });
    });
  }
}

export class MemoryFile extends MemoryNode implements FileNode {
  readonly kind = 'file';
  readonly #caching: OpenFile['caching'];
  contents: Buffer;

  constructor(fileSystem: MemoryFileSystem, contents: Buffer, caching: OpenFile['caching'], times?: Partial<Times>) {
    super(fileSystem, 0o644, times);
    this.contents = contents;
    this.#caching = caching;
  }

  async attributes(): Promise<Attributes> {
    return this.stat(S_IFREG, 1, this.contents.length, this.contents.length);
  }

  async setAttributes(change: AttributeChange): Promise<void> {
    if (change.size !== undefined) this.#resize(change.size);
    this.change(change);
  }

  async open(_flags: number): Promise<OpenFile> {
    this.fileSystem.openFiles++;
    return {
      slot: undefined,
      caching: this.#caching,
      read: async (offset, size) => this.contents.subarray(offset, offset + size),
      write: async (offset, data) => {
        if (offset + data.length > this.contents.length) this.#resize(offset + data.length);
        this.contents.set(data, offset);
        this.changedMs = Date.now();
        return data.length;
      },
      seek: async (offset, whence) => {
        if (offset >= this.contents.length) throw new FsError('ENXIO', 'past the end');
        return whence === 3 ? offset : this.contents.length;
      },
      allocate: async () => {
        throw new FsError('ENOTSUP', 'only disks have holes');
      },
      flush: async () => {},
      sync: async () => {},
      release: async () => {
        this.fileSystem.openFiles--;
      },
    };
  }

  #resize(size: number): void {
    const old = this.contents;
    this.contents = Buffer.alloc(size);
    this.contents.set(old.subarray(0, size));
  }
}

export class DiskFile extends MemoryNode implements FileNode {
  readonly kind = 'file';
  readonly #disk: MemoryDisk;
  readonly #plane: DataPlane;

  constructor(fileSystem: MemoryFileSystem, disk: MemoryDisk) {
    super(fileSystem, 0o600);
    this.#disk = disk;
    this.#plane = memoryPlane(disk, false);
  }

  async attributes(): Promise<Attributes> {
    return this.stat(S_IFREG, 1, DISK_BYTES, allocatedBytes(this.#disk));
  }

  async setAttributes(change: AttributeChange): Promise<void> {
    if (change.size !== undefined) throw new FsError('EPERM', 'the disk keeps its size');
    this.change(change);
  }

  async open(_flags: number): Promise<OpenFile> {
    const slot = this.fileSystem.takeSlot();
    const plane = this.#plane;
    this.fileSystem.openFiles++;
    return {
      slot,
      caching: 'direct',
      read: async (offset, size) => {
        const target = new Uint8Array(Math.max(0, Math.min(size, DISK_BYTES - offset)));
        plane.read(0, offset, target.length, target, 0);
        return target;
      },
      write: async (offset, data, sync) => checked(plane.write(0, offset, data.length, data, 0, sync)),
      seek: async (offset, whence) => checked(plane.seek(0, offset, whence)),
      allocate: async (offset, length, mode) => {
        checked(plane.allocate(0, offset, length, mode));
      },
      flush: async () => {
        plane.flush(0);
      },
      sync: async () => {
        plane.sync(0);
      },
      release: async () => {
        if (slot !== undefined) this.fileSystem.slots.delete(slot);
        this.fileSystem.openFiles--;
      },
    };
  }
}

/** The plane's negated errno as the exception that OpenFile has for it. */
function checked(result: number): number {
  if (result >= 0) return result;
  const { ENOSPC, ENXIO } = constants.errno;
  throw new FsError(-result === ENOSPC ? 'ENOSPC' : -result === ENXIO ? 'ENXIO' : 'ENOTSUP', 'the plane refused');
}
