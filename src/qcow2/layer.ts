/** The images below the top of a chain, as `Backing`: a qcow2 image or a raw file. Read only. */
import type { Storage } from '../storage/storage.ts';
import type { Backing, Image } from './image.ts';
import { kind } from './l2-entry.ts';
import { type L1Table, lookup } from './lookup.ts';
import { backedEnd, readRange } from './read.ts';

/** A qcow2 image with all that is below it. */
export function imageBacking(image: Image): Backing {
  return {
    size: () => image.virtualSize(),
    read: (target, at, length, offset) => readRange(image, undefined, target, at, length, offset),
    extentAt: (offset, length) => extentAt(image, undefined, offset, length),
  };
}

/** A raw file: its bytes are the disk's. What it lacks at its end reads as zeros. */
export function rawBacking(file: Storage): Backing {
  const size = file.size();
  return {
    size: () => size,
    read: (target, at, length, offset) => {
      const got = file.read(target, at, length, offset);
      if (got < length) target.fill(0, at + got, at + length);
    },
    extentAt: (offset, length) => {
      const start = file.nextData(offset);
      if (start !== offset) return { data: false, length: start < 0 ? length : Math.min(length, start - offset) };
      return { data: true, length: Math.min(length, file.nextHole(offset) - offset) };
    },
  };
}

/** Whether the guest bytes at `guest` are data anywhere in the chain, and for how many bytes that holds. */
export function extentAt(
  image: Image,
  table: L1Table | undefined,
  guest: number,
  length: number,
): { readonly data: boolean; readonly length: number } {
  const { extent, backing } = image;
  image.lock();
  try {
    lookup(image, table, guest, length);
  } finally {
    image.unlock();
  }
  const run = extent.length;
  const backed = backedEnd(image, table) - guest;
  if (extent.kind === kind.UNALLOCATED && backing !== undefined && backed > 0) {
    return backing.extentAt(guest, Math.min(run, backed));
  }
  return { data: extent.kind === kind.DATA || extent.kind === kind.COMPRESSED, length: run };
}
