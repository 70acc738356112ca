/**
 * The driver over the package fuse-native (libfuse 2): requests name files by path, and all go through the main
 * thread. For macOS, and wherever /dev/fuse cannot be spoken to directly.
 */

import { constants } from 'node:fs';
import { createRequire } from 'node:module';
import createDebug from 'debug';
import { FsError } from '../errors.ts';
import { errnoNumber } from '../os/errno.ts';
import type { Driver, DriverCapabilities, Mounted, MountOptions } from './driver.ts';
import type {
  AttributeChange,
  Attributes,
  Caller,
  DirectoryNode,
  FileSystem,
  FileSystemStatus,
  Node,
  Notifier,
  OpenFile,
} from './filesystem.ts';
import { escapedOption, SUBTYPE } from './mount-command.ts';
import { watchMount } from './mount-end.ts';
import { checkMountpoint, mountingWay, unmountAndWait } from './mounting.ts';
import { BLOCK_SIZE, STAT_BLOCK_BYTES } from './reply.ts';
import { NAME_BYTES_MAX } from './request.ts';
import { SYNC_FLAGS } from './structures.ts';

const logError = createDebug('vdskfs:error');

/** libfuse 2 has no LSEEK and no FALLOCATE (fuse-native passes none on), no notifications, and 128 KiB requests. */
export const fuseNativeCapabilities: DriverCapabilities = {
  seekData: false,
  allocate: false,
  notifications: false,
  requestBytes: 128 * 1024,
};

/** What a handler answers: a negated errno, or a count where the operation has one; then the operation's result. */
type Answer<T = void> = (result: number, value?: T) => void;

interface FuseStat {
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly size: number;
  readonly nlink: number;
  readonly ino: number;
  readonly blksize: number;
  readonly blocks: number;
  /** Milliseconds, all three. */
  readonly atime: number;
  readonly mtime: number;
  readonly ctime: number;
}

interface FuseStatfs {
  readonly bsize: number;
  readonly frsize: number;
  readonly blocks: number;
  readonly bfree: number;
  readonly bavail: number;
  readonly files: number;
  readonly namemax: number;
}

interface FuseOperations {
  getattr(path: string, answer: Answer<FuseStat>): void;
  readdir(path: string, answer: (result: number, names?: string[], stats?: Partial<FuseStat>[]) => void): void;
  open(path: string, flags: number, answer: Answer<number>): void;
  create(path: string, mode: number, answer: Answer<number>): void;
  read(path: string, fh: number, target: Buffer, size: number, offset: number, answer: Answer): void;
  write(path: string, fh: number, data: Buffer, size: number, offset: number, answer: Answer): void;
  flush(path: string, fh: number, answer: Answer): void;
  fsync(path: string, dataOnly: number, fh: number, answer: Answer): void;
  release(path: string, fh: number, answer: Answer): void;
  truncate(path: string, size: number, answer: Answer): void;
  ftruncate(path: string, fh: number, size: number, answer: Answer): void;
  utimens(path: string, atime: number, mtime: number, answer: Answer): void;
  chmod(path: string, mode: number, answer: Answer): void;
  chown(path: string, uid: number, gid: number, answer: Answer): void;
  mkdir(path: string, mode: number, answer: Answer): void;
  rmdir(path: string, answer: Answer): void;
  unlink(path: string, answer: Answer): void;
  rename(path: string, newPath: string, answer: Answer): void;
  symlink(target: string, path: string, answer: Answer): void;
  link(path: string, newPath: string, answer: Answer): void;
  mknod(path: string, mode: number, device: number, answer: Answer): void;
  statfs(path: string, answer: Answer<FuseStatfs>): void;
}

interface FuseMount {
  mount(done: (error: Error | null | undefined) => void): void;
  unmount(done: (error: Error | null | undefined) => void): void;
}

interface FuseNative {
  new (mountpoint: string, operations: FuseOperations, options: Readonly<Record<string, unknown>>): FuseMount;
  unmount(mountpoint: string, done: (error: Error | null) => void): void;
}

export const mountFuseNative: Driver = async (fileSystem, options) => {
  const way = mountingWay();
  const Fuse = loadFuseNative();
  await checkMountpoint(options.mountpoint);
  const tree = new PathTree(fileSystem);
  fileSystem.attachNotifier(silent);
  const fuse = new Fuse(options.mountpoint, operationsOf(tree), fuseOptions(options));
  await new Promise<void>((resolve, reject) => {
    fuse.mount((error) => {
      if (!error) resolve();
      else reject(new FsError('EIO', `fuse-native cannot mount on '${options.mountpoint}': ${error.message}`));
    });
  });
  const { gone } = await watchMount(options.mountpoint);
  const ended = gone.then(async () => {
    await tree.close();
    // Without this the package's handle keeps the process alive.
    await new Promise<void>((resolve) => fuse.unmount(() => resolve()));
  });
  const unmount = (): Promise<void> => unmountAndWait(way, options.mountpoint, ended);
  return { capabilities: fuseNativeCapabilities, ended, unmount } satisfies Mounted;
};

/** @throws FsError ENOTSUP if the package is not installed, or does not run on this host */
function loadFuseNative(): FuseNative {
  try {
    const Fuse = requireFuseNative();
    // Its own would detach lazily, also from a mount with open files. Ours has unmounted when this is called.
    Fuse.unmount = (_mountpoint, done) => done(null);
    return Fuse;
  } catch (cause) {
    const why = (cause as Error).message.split('\n', 1)[0];
    throw new FsError(
      'ENOTSUP',
      `the package fuse-native did not load (${why}): run 'npm install fuse-native', or use --driver native`,
      { cause },
    );
  }
}

/**
 * The package's binary asks for libfuse.so.2 by name alone, so it loads where the system has one. Elsewhere the copy
 * that the package brings is loaded first: the linker then takes that one, which bears the name.
 */
function requireFuseNative(): FuseNative {
  const require = createRequire(import.meta.url);
  try {
    return require('fuse-native');
  } catch (error) {
    if (!(error as Error).message.includes('libfuse')) throw error;
    const ofPackage = createRequire(require.resolve('fuse-native'));
    require('koffi').load(ofPackage('fuse-shared-library').lib);
    return require('fuse-native');
  }
}

/**
 * Options of the package, and behind the subtype those of libfuse that it has no word for. `direct_io` and timeouts
 * of 0: nothing is cached, since nothing could be invalidated.
 */
export function fuseOptions({ source, readOnly, allowOther }: MountOptions): Readonly<Record<string, unknown>> {
  const more = ['direct_io', 'use_ino', 'hard_remove', 'big_writes', 'nosuid', 'nodev', ...(readOnly ? ['ro'] : [])];
  return {
    fsname: escapedOption(source),
    subtype: [SUBTYPE, ...more].join(','),
    entryTimeout: '0',
    attrTimeout: '0',
    acAttrTimeout: '0',
    allowOther,
    defaultPermissions: allowOther,
    timeout: false, // a checkpoint may take longer than any
  };
}

const silent: Notifier = { invalidateNode: () => {}, invalidateEntry: () => {} };

/** The package tells neither who asks nor when they stop waiting. */
const caller: Caller = {
  uid: process.geteuid?.() ?? 0,
  gid: process.getegid?.() ?? 0,
  pid: 0,
  signal: new AbortController().signal,
};

/** The tree by paths, and its open files by numbers. */
class PathTree {
  readonly fileSystem: FileSystem;
  readonly #open = new Map<number, { readonly open: OpenFile; readonly sync: boolean }>();
  #next = 1;

  constructor(fileSystem: FileSystem) {
    this.fileSystem = fileSystem;
  }

  /** @throws FsError ENOENT, ENOTDIR */
  async node(path: string): Promise<Node> {
    let node: Node = this.fileSystem.root;
    for (const name of path.split('/')) {
      if (name !== '') node = await directoryOf(node, path).lookup(name);
    }
    return node;
  }

  async directory(path: string): Promise<DirectoryNode> {
    return directoryOf(await this.node(path), path);
  }

  /** The directory that holds the last name of `path`, and that name. */
  async parent(path: string): Promise<{ directory: DirectoryNode; name: string }> {
    const slash = path.lastIndexOf('/');
    const name = path.slice(slash + 1);
    if (Buffer.byteLength(name) > NAME_BYTES_MAX) {
      throw new FsError('ENAMETOOLONG', `the name ${name} is longer than ${NAME_BYTES_MAX} bytes`);
    }
    return { directory: await this.directory(path.slice(0, slash)), name };
  }

  add(open: OpenFile, flags: number): number {
    const fh = this.#next++;
    this.#open.set(fh, { open, sync: (flags & SYNC_FLAGS) !== 0 });
    return fh;
  }

  /** @throws FsError EBADF */
  opened(fh: number): { readonly open: OpenFile; readonly sync: boolean } {
    const found = this.#open.get(fh);
    if (found === undefined) throw new FsError('EBADF', `no file is open under handle ${fh}`);
    return found;
  }

  async release(fh: number): Promise<void> {
    const { open } = this.opened(fh);
    this.#open.delete(fh);
    await open.release();
  }

  async change(path: string, change: AttributeChange): Promise<void> {
    await (await this.node(path)).setAttributes(change, caller);
  }

  /** Release what is still open. */
  async close(): Promise<void> {
    for (const fh of [...this.#open.keys()]) {
      await this.release(fh).catch((error) => logError('release failed: %O', error));
    }
  }
}

function directoryOf(node: Node, path: string): DirectoryNode {
  if (node.kind !== 'directory') throw new FsError('ENOTDIR', `a part of the path ${path} is not a directory`);
  return node;
}

function operationsOf(tree: PathTree): FuseOperations {
  /** Run `work`, and answer with what it returns or throws. */
  const run = <T>(name: string, answer: (result: number, value?: T) => void, work: () => Promise<T>): void => {
    work().then(
      (value) => answer(0, value),
      (error) => answer(failure(name, error)),
    );
  };
  /** The same for an operation that answers with a count. */
  const count = (name: string, answer: Answer, work: () => Promise<number>): void => {
    work().then(answer, (error) => answer(failure(name, error)));
  };
  const refuse = (answer: Answer): void => answer(-errnoNumber('EPERM'));

  return {
    getattr: (path, answer) =>
      run('getattr', answer, async () => {
        const node = await tree.node(path);
        return statOf(node, await node.attributes());
      }),

    readdir: (path, answer) => {
      listing(tree, path).then(
        ({ names, stats }) => answer(0, names, stats),
        (error) => answer(failure('readdir', error)),
      );
    },

    open: (path, flags, answer) =>
      run('open', answer, async () => {
        const node = await tree.node(path);
        if (node.kind !== 'file') throw new FsError('EISDIR', `${path} is a directory`);
        return tree.add(await node.open(flags, caller), flags);
      }),

    create: (path, mode, answer) =>
      run('create', answer, async () => {
        const { directory, name } = await tree.parent(path);
        // The flags of open(2) are not passed on.
        const flags = constants.O_RDWR | constants.O_CREAT;
        const { open } = await directory.createFile(name, flags, mode & 0o7777, caller);
        return tree.add(open, flags);
      }),

    read: (_path, fh, target, size, offset, answer) =>
      count('read', answer, async () => {
        const bytes = await tree.opened(fh).open.read(offset, size, caller);
        const taken = bytes.subarray(0, size);
        target.set(taken);
        return taken.length;
      }),

    write: (_path, fh, data, _size, offset, answer) =>
      count('write', answer, async () => {
        const { open, sync } = tree.opened(fh);
        return open.write(offset, data, sync, caller);
      }),

    flush: (_path, fh, answer) =>
      run('flush', answer, async () => {
        await tree.opened(fh).open.flush();
      }),

    fsync: (_path, _dataOnly, fh, answer) =>
      run('fsync', answer, async () => {
        await tree.opened(fh).open.sync();
      }),

    release: (_path, fh, answer) =>
      run('release', answer, async () => {
        await tree.release(fh);
      }),

    truncate: (path, size, answer) =>
      run('truncate', answer, async () => {
        await tree.change(path, { size });
      }),

    ftruncate: (path, _fh, size, answer) =>
      run('ftruncate', answer, async () => {
        await tree.change(path, { size });
      }),

    utimens: (path, _atime, _mtime, answer) =>
      run('utimens', answer, async () => {
        await tree.change(path, { times: true });
      }),

    chmod: (path, mode, answer) =>
      run('chmod', answer, async () => {
        await tree.change(path, { mode });
      }),

    chown: (path, uid, gid, answer) =>
      run('chown', answer, async () => {
        await tree.change(path, {
          ...(uid !== UNCHANGED && { uid }),
          ...(gid !== UNCHANGED && { gid }),
        });
      }),

    mkdir: (path, _mode, answer) =>
      run('mkdir', answer, async () => {
        const { directory, name } = await tree.parent(path);
        await directory.makeDirectory(name, caller);
      }),

    rmdir: (path, answer) =>
      run('rmdir', answer, async () => {
        const { directory, name } = await tree.parent(path);
        await directory.removeDirectory(name, caller);
      }),

    unlink: (path, answer) =>
      run('unlink', answer, async () => {
        const { directory, name } = await tree.parent(path);
        await directory.unlink(name, caller);
      }),

    rename: (path, newPath, answer) =>
      run('rename', answer, async () => {
        const from = await tree.parent(path);
        const to = await tree.parent(newPath);
        await from.directory.rename(from.name, to.directory, to.name, false, caller);
      }),

    symlink: (_target, _path, answer) => refuse(answer),
    link: (_path, _newPath, answer) => refuse(answer),
    mknod: (_path, _mode, _device, answer) => refuse(answer),

    statfs: (_path, answer) => run('statfs', answer, async () => statfsOf(await tree.fileSystem.status())),
  };
}

/** (uid_t)-1 of chown(2). */
const UNCHANGED = 0xffff_ffff;

function failure(operation: string, error: unknown): number {
  if (error instanceof FsError) return -errnoNumber(error.errno);
  logError('%s failed: %O', operation, error);
  return -errnoNumber('EIO');
}

async function listing(tree: PathTree, path: string): Promise<{ names: string[]; stats: Partial<FuseStat>[] }> {
  const directory = await tree.directory(path);
  const names = ['.', '..'];
  const stats = [typeAndIno('directory', directory.ino), typeAndIno('directory', directory.parentIno)];
  for (const { name, node } of await directory.list()) {
    names.push(name);
    stats.push(typeAndIno(node.kind, node.ino));
  }
  return { names, stats };
}

/** All that readdir(3) shows of an entry. */
const typeAndIno = (kind: Node['kind'], ino: number): Partial<FuseStat> => ({
  mode: kind === 'directory' ? constants.S_IFDIR : constants.S_IFREG,
  ino,
  // Left out they would be read as the present.
  atime: 0,
  mtime: 0,
  ctime: 0,
});

const statOf = (node: Node, attributes: Attributes): FuseStat => ({
  mode: attributes.mode,
  uid: attributes.uid,
  gid: attributes.gid,
  size: attributes.size,
  nlink: attributes.nlink,
  ino: node.ino,
  blksize: BLOCK_SIZE,
  blocks: Math.ceil(attributes.allocatedBytes / STAT_BLOCK_BYTES),
  atime: Math.max(0, Math.floor(attributes.atimeMs)),
  mtime: Math.max(0, Math.floor(attributes.mtimeMs)),
  ctime: Math.max(0, Math.floor(attributes.ctimeMs)),
});

/** The package's counts have 32 bits: blocks grow until they suffice. */
export function statfsOf(status: FileSystemStatus): FuseStatfs {
  let { blockBytes } = status;
  while (status.totalBytes / blockBytes >= 2 ** 32) blockBytes *= 2;
  const blocks = (bytes: number): number => Math.floor(bytes / blockBytes);
  return {
    bsize: blockBytes,
    frsize: blockBytes,
    blocks: blocks(status.totalBytes),
    bfree: blocks(status.freeBytes),
    bavail: blocks(status.availableBytes),
    files: status.files,
    namemax: NAME_BYTES_MAX,
  };
}
