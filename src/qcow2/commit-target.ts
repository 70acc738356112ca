/** The image that a commit writes into: the backing file, as a qcow2 image or a raw file, opened for writing. */
import { FsError } from '../errors.ts';
import type { Storage } from '../storage/storage.ts';
import { zeroRange } from './discard.ts';
import { flushIfRoom } from './flush.ts';
import type { Image } from './image.ts';
import { growDisk, shrinkDisk } from './resize.ts';
import { writeRange } from './write.ts';

/** All offsets are guest bytes. @throws FsError ENOSPC, EIO: what was done until then stays */
export interface CommitTarget {
  size(): number;
  /** The new bytes read as zeros. Durable. @param bytes not below the present size */
  grow(bytes: number): Promise<void>;
  /** What lies behind is gone. Durable. @param bytes not above the present size */
  shrink(bytes: number): Promise<void>;
  /** The range must lie inside `size()`. */
  write(source: Uint8Array, at: number, length: number, offset: number): void;
  /** The range, inside `size()`, reads as zeros afterwards, whatever is below. Takes no space where the format can say so. */
  zero(offset: number, length: number): void;
  flush(): void;
}

/**
 * A qcow2 image, open for writing, with whatever is below it as its backing. All threads that read the chain must read it
 * through the same shared memory: caches of their own would go stale.
 */
export function imageTarget(image: Image): CommitTarget {
  const mustBeOpen = (open: boolean): void => {
    if (open) return;
    throw new FsError('EBUSY', `${image.file.path} is being changed by another operation; try again when it has ended`);
  };
  return {
    size: () => image.virtualSize(),
    grow: (bytes) => growDisk(image, bytes),
    shrink: (bytes) => shrinkDisk(image, bytes),
    write: (source, at, length, offset) => mustBeOpen(writeRange(image, source, at, length, offset)),
    zero: (offset, length) => mustBeOpen(zeroRange(image, offset, length, 'free')),
    flush: () => flushIfRoom(image),
  };
}

/** Explicit zeros are written from here. */
const ZEROS = new Uint8Array(64 * 1024);

/** A raw file: zeros are holes where the host can make them. */
export function rawTarget(file: Storage): CommitTarget {
  const resize = async (bytes: number): Promise<void> => {
    file.truncate(bytes);
    file.flush();
  };
  return {
    size: () => file.size(),
    grow: resize,
    shrink: resize,
    write: (source, at, length, offset) => file.write(source, at, length, offset),
    zero: (offset, length) => {
      if (!file.punch(offset, length)) writeZeros(file, offset, offset + length);
    },
    flush: () => file.flush(),
  };
}

function writeZeros(file: Storage, from: number, to: number): void {
  let position = from;
  while (position < to) {
    const data = file.nextData(position);
    if (data < 0 || data >= to) return;
    const end = Math.min(to, file.nextHole(data));
    for (position = data; position < end; position += ZEROS.length) {
      file.write(ZEROS, 0, Math.min(ZEROS.length, end - position), position);
    }
    position = end;
  }
}
