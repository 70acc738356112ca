/**
 * A file's view of `Contents`: the range `[base, base + length)` of a disk, cut at the disk's end. `length` is Infinity
 * for what follows the disk's size. Synchronous and without allocation: the data threads and the main thread answer
 * by the same functions. All offsets and sizes in bytes; offsets count from `base`. All throw FsError.
 */
import type { Contents } from '../disk/disk.ts';
import { FsError } from '../errors.ts';

/** Returned where the gate is closed: nothing was changed, ask again after `Disk.whenOpen()`. */
export const GATE_CLOSED = -1;

/** lseek(2); the same numbers on Linux and FreeBSD. */
export const SEEK_DATA = 3;
export const SEEK_HOLE = 4;

/** fallocate(2) of Linux, which is also what FreeBSD sends. */
export const KEEP_SIZE = 0x01;
export const PUNCH_HOLE = 0x02;
export const ZERO_RANGE = 0x10;

/** Bytes of the file now; 0 when the disk has shrunk to before its start. */
export const rangeBytes = (contents: Contents, base: number, length: number): number =>
  Math.max(0, Math.min(length, contents.size() - base));

/** Returns the bytes read: fewer than `size` only at the end of the file. */
export function readRange(
  contents: Contents,
  base: number,
  length: number,
  offset: number,
  size: number,
  target: Uint8Array,
  at: number,
): number {
  const count = Math.min(size, rangeBytes(contents, base, length) - offset);
  if (count <= 0) return 0;
  contents.read(target, at, count, base + offset);
  return count;
}

/**
 * Write what fits before the end. Returns the bytes taken, or GATE_CLOSED.
 * @throws FsError ENOSPC where not one byte fits, as at the end of a block device
 */
export function writeRange(
  contents: Contents,
  base: number,
  length: number,
  offset: number,
  size: number,
  source: Uint8Array,
  at: number,
): number {
  if (size === 0) return 0;
  const count = Math.min(size, rangeBytes(contents, base, length) - offset);
  if (count <= 0) throw new FsError('ENOSPC', `The write at ${offset} is past the end of the disk or partition.`);
  return contents.write(source, at, count, base + offset) ? count : GATE_CLOSED;
}

/**
 * Write to a file that grows: all is taken. Returns `size`, or GATE_CLOSED.
 * @throws FsError EFBIG beyond what numbers count exactly, and the contents' own
 */
export function writeGrowing(contents: Contents, offset: number, size: number, source: Uint8Array, at: number): number {
  if (size === 0) return 0;
  if (offset + size > Number.MAX_SAFE_INTEGER) throw new FsError('EFBIG', `No file has bytes at ${offset}.`);
  return contents.write(source, at, size, offset) ? size : GATE_CLOSED;
}

/** lseek(2) in a file of `size` bytes without holes. @throws FsError ENXIO past the end */
export function seekSolid(offset: number, whence: number, size: number): number {
  if (whence !== SEEK_DATA && whence !== SEEK_HOLE) throw new FsError('EINVAL', `lseek knows no whence ${whence}.`);
  if (offset < 0 || offset >= size) throw new FsError('ENXIO', `The offset ${offset} is past the end of the file.`);
  return whence === SEEK_DATA ? offset : size;
}

/** @throws FsError ENXIO past the end, or when no data follows */
export function seekRange(contents: Contents, base: number, length: number, offset: number, whence: number): number {
  const end = rangeBytes(contents, base, length);
  seekSolid(offset, whence, end);
  if (whence === SEEK_HOLE) return Math.min(contents.nextHole(base + offset) - base, end);
  const found = contents.nextData(base + offset) - base;
  if (found < 0 || found >= end) throw new FsError('ENXIO', `No data follows the offset ${offset}.`);
  return found;
}

/**
 * fallocate(2): punching discards, zeroing writes zeros, plain reservation inside the file is granted as it is.
 * Returns 0, or GATE_CLOSED.
 * @throws FsError ENOTSUP for every other mode, and for what would make the file longer
 */
export function allocateRange(
  contents: Contents,
  base: number,
  length: number,
  offset: number,
  bytes: number,
  mode: number,
): number {
  const end = rangeBytes(contents, base, length);
  const count = Math.min(bytes, end - offset);
  switch (mode) {
    case PUNCH_HOLE | KEEP_SIZE:
      return count <= 0 || contents.discard(base + offset, count) ? 0 : GATE_CLOSED;
    case ZERO_RANGE | KEEP_SIZE:
      return count <= 0 || contents.writeZeroes(base + offset, count) ? 0 : GATE_CLOSED;
    case ZERO_RANGE:
      if (count < bytes) break;
      return contents.writeZeroes(base + offset, count) ? 0 : GATE_CLOSED;
    case 0:
    case KEEP_SIZE:
      if (count < bytes) break;
      return 0;
    default:
      throw new FsError(
        'ENOTSUP',
        `fallocate mode 0x${mode.toString(16)} is not possible on a disk: punch holes or zero ranges.`,
      );
  }
  throw new FsError('ENOTSUP', `fallocate cannot make a disk longer: grow it with truncate on disk.raw.`);
}
