import { closeSync, constants, fdatasyncSync, fstatSync, ftruncateSync, openSync, readSync, writeSync } from 'node:fs';
import { FsError } from '../errors.ts';
import { codeOf, errnoName, errnoNumber, fsErrorFrom } from '../os/errno.ts';
import { type SystemCalls, systemCalls } from '../os/system-calls.ts';
import type { Storage } from './storage.ts';

export interface OpenOptions {
  readonly readOnly: boolean;
  /**
   * `new`: the file must not exist yet. `missing`: made if it does not exist, else opened as it is; whoever wants it
   * empty locks it first and truncates it then. Left out: the file must exist.
   */
  readonly create?: 'new' | 'missing';
}

/** A `HostFile` as plain data, for other threads of this process. */
export interface SharedFile {
  readonly fd: number;
  readonly path: string;
  readonly readOnly: boolean;
}

const CREATE = {
  new: constants.O_CREAT | constants.O_EXCL,
  missing: constants.O_CREAT,
} as const;

const FILE_MODE = 0o644;

/**
 * A regular file or a disk device of the host. The one made by `open` owns the descriptor; those made by `adopt` use
 * it, and must not be used any more when the owner is disposed of: by then the number may mean another file.
 *
 * A device keeps its size: `truncate` to less does nothing, to more is ENOSPC.
 */
export class HostFile implements Storage, Disposable {
  #path: string;
  readonly readOnly: boolean;
  readonly #owner: boolean;
  readonly #device: boolean;
  #fd: number;
  /** The file system has said that it cannot punch; asking again would be a system call for nothing. */
  #cannotPunch = false;

  private constructor({ fd, path, readOnly }: SharedFile, device: boolean, owner: boolean) {
    this.#fd = fd;
    this.#path = path;
    this.readOnly = readOnly;
    this.#device = device;
    this.#owner = owner;
  }

  /** @throws FsError ENOENT, EACCES, EROFS, EEXIST, EISDIR … ; EINVAL for what is neither a file nor a disk device */
  static open(path: string, { readOnly, create }: OpenOptions): HostFile {
    // O_NONBLOCK, so that a named pipe is refused below instead of waiting for its other end. Files ignore it.
    const flags =
      (readOnly ? constants.O_RDONLY : constants.O_RDWR) | constants.O_NONBLOCK | (create ? CREATE[create] : 0);
    let fd: number;
    try {
      fd = openSync(path, flags, FILE_MODE);
    } catch (error) {
      throw fsErrorFrom(error, `cannot ${create === 'new' ? 'create' : 'open'} '${path}'`);
    }
    try {
      return new HostFile({ fd, path, readOnly }, isDevice(fd, path), true);
    } catch (error) {
      closeSync(fd);
      throw error;
    }
  }

  /** The file that another thread of this process shares. Never closes it. */
  static adopt(shared: SharedFile): HostFile {
    return new HostFile(shared, isDevice(shared.fd, shared.path), false);
  }

  get path(): string {
    return this.#path;
  }

  /** The file has another name now: for messages. */
  moveTo(path: string): void {
    this.#path = path;
  }

  share(): SharedFile {
    return { fd: this.#fd, path: this.path, readOnly: this.readOnly };
  }

  /** The descriptor, for locks. It stays this object's. */
  get fd(): number {
    return this.#fd;
  }

  size(): number {
    try {
      if (!this.#device) return fstatSync(this.#fd).size;
    } catch (error) {
      throw fsErrorFrom(error, `cannot find out the size of '${this.path}'`);
    }
    const end = systemCalls().seek(this.#fd, 0, 'end');
    if (end < 0) throw fsErrorFrom(-end, `cannot find out the size of the device '${this.path}'`);
    return end;
  }

  read(target: Uint8Array, at: number, length: number, position: number): number {
    let done = 0;
    while (done < length) {
      let count: number;
      try {
        count = readSync(this.#fd, target, at + done, length - done, position + done);
      } catch (error) {
        if (codeOf(error) === 'EINTR') continue;
        throw fsErrorFrom(error, `cannot read ${length} bytes at ${offset(position)} of '${this.path}'`);
      }
      if (count === 0) break;
      done += count;
    }
    return done;
  }

  write(source: Uint8Array, at: number, length: number, position: number): void {
    let done = 0;
    while (done < length) {
      let count: number;
      try {
        count = writeSync(this.#fd, source, at + done, length - done, position + done);
      } catch (error) {
        if (codeOf(error) === 'EINTR') continue;
        throw fsErrorFrom(error, `cannot write ${length} bytes at ${offset(position)} of '${this.path}'`);
      }
      // write(2) of a file never takes nothing without saying why; whatever does must not keep us here forever.
      if (count === 0)
        throw new FsError('EIO', `the host took none of the bytes at ${offset(position)} of '${this.path}'`);
      done += count;
    }
  }

  flush(): void {
    if (this.readOnly) return;
    try {
      fdatasyncSync(this.#fd);
    } catch (error) {
      // Never tried again: after a failure the kernel may count the lost pages as clean.
      throw fsErrorFrom(error, `cannot flush '${this.path}'; what was written last may be lost`);
    }
  }

  truncate(size: number): void {
    if (this.#device) {
      const available = this.size();
      if (size <= available) return;
      throw new FsError('ENOSPC', `the device '${this.path}' has ${available} bytes, ${size} are needed: enlarge it`);
    }
    try {
      ftruncateSync(this.#fd, size);
    } catch (error) {
      throw fsErrorFrom(error, `cannot set the size of '${this.path}' to ${size} bytes`);
    }
  }

  punch(position: number, length: number): boolean {
    if (this.#cannotPunch) return false;
    if (length === 0) return true;
    const result = ifPossible((system) => system.punchHole(this.#fd, position, length));
    if (result >= 0) return true;
    const errno = errnoName(-result);
    // ENXIO: ENODEV of a device that cannot discard.
    if (errno === 'ENOTSUP' || errno === 'ENOSYS' || errno === 'ENXIO') {
      this.#cannotPunch = true;
      return false;
    }
    throw fsErrorFrom(-result, `cannot free ${length} bytes at ${offset(position)} of '${this.path}'`);
  }

  nextData(position: number): number {
    const found = this.#seek(position, 'data');
    if (found !== undefined) return found;
    return position < this.size() ? position : -1;
  }

  nextHole(position: number): number {
    const found = this.#seek(position, 'hole');
    if (found !== undefined && found !== -1) return found;
    return this.size();
  }

  allocatedBytes(): number {
    if (this.#device) return this.size();
    try {
      // st_blocks counts 512 bytes whatever the file system's block size (stat(2)).
      return fstatSync(this.#fd).blocks * 512;
    } catch (error) {
      throw fsErrorFrom(error, `cannot find out the space that '${this.path}' takes`);
    }
  }

  /** Only the owner closes, and only once. */
  [Symbol.dispose](): void {
    if (this.#fd === -1) return;
    const fd = this.#fd;
    this.#fd = -1;
    if (this.#owner) closeSync(fd);
  }

  /** -1 past the last of them (ENXIO); undefined where holes cannot be found: all is data then. */
  #seek(position: number, to: 'data' | 'hole'): number | undefined {
    const found = ifPossible((system) => system.seek(this.#fd, position, to));
    if (found >= 0) return found;
    const errno = errnoName(-found);
    if (errno === 'ENXIO') return -1;
    // EINVAL: a device, or a file system without SEEK_DATA.
    if (errno === 'EINVAL' || errno === 'ENOTSUP') return undefined;
    throw fsErrorFrom(-found, `cannot look for ${to === 'data' ? 'data' : 'a hole'} in '${this.path}'`);
  }
}

const offset = (position: number): string => `0x${position.toString(16)}`;

/** @throws FsError EISDIR, EINVAL unless it can hold an image */
function isDevice(fd: number, path: string): boolean {
  let stat: ReturnType<typeof fstatSync>;
  try {
    stat = fstatSync(fd);
  } catch (error) {
    throw fsErrorFrom(error, `cannot look at '${path}'`);
  }
  if (stat.isFile()) return false;
  // FreeBSD's disks are character devices; a terminal among them is found out by its lack of a size.
  if (stat.isBlockDevice() || (stat.isCharacterDevice() && process.platform !== 'linux')) return true;
  if (stat.isDirectory()) throw new FsError('EISDIR', `'${path}' is a directory, not a disk image`);
  throw new FsError('EINVAL', `'${path}' is neither a file nor a disk device`);
}

/** Holes save space and time only: where system calls cannot be made (no koffi), files are taken to have none. */
function ifPossible(call: (system: SystemCalls) => number): number {
  try {
    return call(systemCalls());
  } catch (error) {
    if (error instanceof FsError && error.errno === 'ENOTSUP') return -errnoNumber('ENOTSUP');
    throw error;
  }
}
