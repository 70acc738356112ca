/**
 * Who holds the lock that is in the way. Linux names no owner of an open-file-description lock (its process number is
 * -1), but shows in /proc/PID/fdinfo/FD which locks each descriptor holds (proc(5)).
 */
import { readdirSync, readFileSync } from 'node:fs';

/** A process as messages name it. */
export interface LockHolder {
  readonly pid: number;
  /** The program's name, at most 15 bytes of it; empty if it ended meanwhile. */
  readonly program: string;
}

/** One `lock:` line of fdinfo. */
export interface FileLock {
  /** Device and inode, as the kernel writes them: "fe:00:1234". */
  readonly file: string;
  /** First and last byte of the range; the last is Infinity for a lock to the end of the file. */
  readonly first: number;
  readonly last: number;
}

const LOCK_LINE = /^lock:\s+\d+:\s+\S+\s+\S+\s+\S+\s+-?\d+\s+(\S+:\d+)\s+(\d+)\s+(\d+|EOF)$/gm;

/** The locks in the text of one fdinfo file. */
export function parseLocks(fdinfo: string): FileLock[] {
  return [...fdinfo.matchAll(LOCK_LINE)].map(([, file, first, last]) => ({
    file: file as string,
    first: Number(first),
    last: last === 'EOF' ? Number.POSITIVE_INFINITY : Number(last),
  }));
}

const covers = (lock: FileLock, file: string, byte: number): boolean =>
  lock.file === file && lock.first <= byte && byte <= lock.last;

/**
 * The process that holds a lock on `byte` of the file behind `fd` through another descriptor. `fd` must hold some lock
 * itself: that shows how the kernel writes the file. Undefined if it cannot be found out: another user's process,
 * another host or container, another system than Linux.
 */
export function findLockHolder(fd: number, byte: number): LockHolder | undefined {
  const file = parseLocks(readText(`/proc/self/fdinfo/${fd}`))[0]?.file;
  if (file === undefined) return undefined;
  for (const pid of numbersIn('/proc')) {
    for (const other of numbersIn(`/proc/${pid}/fdinfo`)) {
      if (pid === process.pid && other === fd) continue;
      if (parseLocks(readText(`/proc/${pid}/fdinfo/${other}`)).some((lock) => covers(lock, file, byte))) {
        return { pid, program: readText(`/proc/${pid}/comm`).trim() };
      }
    }
  }
  return undefined;
}

/** Processes and descriptors come and go while they are looked at, and others' may not be seen: those count as empty. */
function readText(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return '';
  }
}

function numbersIn(folder: string): number[] {
  try {
    return readdirSync(folder).map(Number).filter(Number.isInteger);
  } catch {
    return [];
  }
}
