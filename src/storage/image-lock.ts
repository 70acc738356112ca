/**
 * Locks that keep two programs from using one image in ways that exclude each other. On Linux QEMU's protocol, so that
 * QEMU and vdskfs respect each other; on FreeBSD, where QEMU takes no locks, flock(2), which libvdsk's bhyve takes too.
 *
 * QEMU's protocol (block/file-posix.c): for each permission that a user needs, it holds a shared lock on one byte; for
 * each permission that it cannot bear in others, a shared lock on another byte. First it takes its bytes, then it looks
 * whether others hold those that speak against it. Of two that start at once, both may fail, but never both succeed.
 * The bytes need not exist, and the locks belong to the open file description: they end with its last descriptor.
 */
import { FsError } from '../errors.ts';
import { errnoName, fsErrorFrom } from '../os/errno.ts';
import { findLockHolder, type LockHolder } from '../os/lock-holder.ts';
import { type SystemCalls, systemCalls } from '../os/system-calls.ts';

/** `write`: alone with the image. `read`: together with other readers only. */
export type LockMode = 'read' | 'write';

/** RAW_LOCK_PERM_BASE plus the number of the permission's bit: "I do this". */
const USES = { consistentRead: 100, write: 101, resize: 103 } as const;
/** RAW_LOCK_SHARED_BASE plus the number of the permission's bit: "nobody else may do this". */
const REFUSES = { consistentRead: 200, write: 201, resize: 203 } as const;

/**
 * What QEMU takes on the file of a qcow2 image that it has open for writing, and on one that it only reads (a backing
 * file too): neither bears writers and resizers.
 */
const HELD: Readonly<Record<LockMode | 'none', readonly number[]>> = {
  none: [],
  read: [USES.consistentRead, REFUSES.write, REFUSES.resize],
  write: [USES.consistentRead, USES.write, USES.resize, REFUSES.write, REFUSES.resize],
};

/** Bytes that nobody else may hold, those of writers first: they make the better message. */
const MUST_BE_FREE: Readonly<Record<LockMode, readonly number[]>> = {
  read: [USES.write, USES.resize, REFUSES.consistentRead],
  write: [USES.write, USES.resize, REFUSES.write, REFUSES.resize, REFUSES.consistentRead],
};

/**
 * Lock the image behind `fd`, without waiting. The lock ends with the descriptor. Where it fails, what was `held`
 * before is still held (but not by flock(2), which may lose it on the way from read to write).
 * @param held what an earlier call locked through the same descriptor, to change from one mode to the other
 * @throws FsError EBUSY, naming the holder where it can be found out; ENOTSUP where the file system knows no locks
 */
export function lockImage(fd: number, path: string, mode: LockMode, held: LockMode | 'none' = 'none'): void {
  const system = systemCalls();
  if (system.locking === 'file') lockWhole(system, fd, path, mode);
  else lockBytes(system, fd, path, mode, held);
}

/**
 * Whether another process has the image open for writing, as far as QEMU's locks tell; takes none itself. Undefined where
 * locks cannot be looked at without taking one.
 */
export function isWritten(fd: number): boolean | undefined {
  const system = systemCalls();
  if (system.locking === 'file') return undefined;
  return system.testByte(fd, { offset: USES.write, kind: 'exclusive' }) < 0;
}

function lockBytes(system: SystemCalls, fd: number, path: string, mode: LockMode, held: LockMode | 'none'): void {
  const added = HELD[mode].filter((offset) => !HELD[held].includes(offset));
  const dropped = HELD[held].filter((offset) => !HELD[mode].includes(offset));
  const unlock = (offsets: readonly number[]): void => {
    for (const offset of offsets) system.lockByte(fd, { offset, kind: 'none' });
  };
  try {
    for (const offset of added) {
      // Shared locks never meet in the way of each other: only a program that is not QEMU can refuse here.
      const result = system.lockByte(fd, { offset, kind: 'shared' });
      if (result < 0) throw refusal(result, fd, path, mode, offset);
    }
    for (const offset of MUST_BE_FREE[mode]) {
      const result = system.testByte(fd, { offset, kind: 'exclusive' });
      if (result < 0) throw refusal(result, fd, path, mode, offset);
    }
  } catch (error) {
    unlock(added);
    throw error;
  }
  unlock(dropped);
}

function lockWhole(system: SystemCalls, fd: number, path: string, mode: LockMode): void {
  const result = system.lockFile(fd, mode === 'read' ? 'shared' : 'exclusive');
  if (result < 0) throw refusal(result, fd, path, mode, 0);
}

function refusal(result: number, fd: number, path: string, mode: LockMode, offset: number): FsError {
  const errno = errnoName(-result);
  // POSIX lets a system say either (fcntl(2), F_SETLK).
  if (errno !== 'EAGAIN' && errno !== 'EACCES') return fsErrorFrom(-result, `cannot lock '${path}'`);
  return new FsError('EBUSY', describeConflict(path, mode, offset, findLockHolder(fd, offset)));
}

/** One sentence: what, which file, who, what to do. */
export function describeConflict(path: string, mode: LockMode, offset: number, holder: LockHolder | undefined): string {
  const use =
    offset === USES.write || offset === USES.resize
      ? 'open for writing'
      : offset === REFUSES.write || offset === REFUSES.resize
        ? 'open for reading'
        : 'in use';
  const who =
    holder === undefined
      ? 'in another process'
      : holder.pid === process.pid
        ? 'in this process already'
        : `in ${holder.program || 'a process'} (pid ${holder.pid})`;
  const instead = mode === 'write' && use === 'open for reading' ? ', or open it read-only' : '';
  return `'${path}' is ${use} ${who}: end that first${instead}`;
}
