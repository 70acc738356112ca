/** A disk of shared memory with holes: what a data plane serves in these tests. Runs in the server's process only. */

import { constants } from 'node:os';
import { FsError } from '../../src/errors.ts';
import { type DataPlane, DEFER } from '../../src/fuse/data-plane.ts';

export const DISK_BYTES = 64 * 1024 * 1024;
const BLOCK_BYTES = 4096;

/** From here on the plane defers everything: the main thread serves it. */
export const DEFERRED_FROM = 32 * 1024 * 1024;
/** A read of exactly this many bytes throws what is no FsError. */
export const BUG_BYTES = 666;
/** A read of exactly this many bytes throws FsError EBUSY. */
export const BUSY_BYTES = 667;

const FALLOC_KEEP_SIZE = 1;
const FALLOC_PUNCH_HOLE = 2;
const FALLOC_ZERO_RANGE = 0x10;

/** Posted to threads as it is. */
export interface MemoryDisk {
  readonly bytes: SharedArrayBuffer;
  /** One byte per block: 1 where it holds data. */
  readonly map: SharedArrayBuffer;
  readonly counters: SharedArrayBuffer;
}

/** Words of `counters`, an Int32Array. */
export const counter = { SYNCS: 0, SYNC_WRITES: 1, FLUSHES: 2 } as const;

export const makeMemoryDisk = (): MemoryDisk => ({
  bytes: new SharedArrayBuffer(DISK_BYTES),
  map: new SharedArrayBuffer(DISK_BYTES / BLOCK_BYTES),
  counters: new SharedArrayBuffer(4 * Object.keys(counter).length),
});

/** `deferring`: with the DEFERRED_FROM rule and the odd sizes that fail, as a data thread has it. */
export function memoryPlane(disk: MemoryDisk, deferring: boolean): DataPlane {
  const bytes = new Uint8Array(disk.bytes);
  const map = new Uint8Array(disk.map);
  const counters = new Int32Array(disk.counters);
  const { errno } = constants;

  const mark = (offset: number, length: number, value: number): void => {
    if (length > 0) map.fill(value, Math.floor(offset / BLOCK_BYTES), Math.ceil((offset + length) / BLOCK_BYTES));
  };
  const next = (offset: number, value: number): number => {
    if (map[Math.floor(offset / BLOCK_BYTES)] === value) return offset;
    const block = map.indexOf(value, Math.floor(offset / BLOCK_BYTES) + 1);
    return block < 0 ? -1 : block * BLOCK_BYTES;
  };

  return {
    read(_fh, offset, size, reply, at) {
      if (deferring && size === BUG_BYTES) throw new TypeError('a bug in the plane');
      if (deferring && size === BUSY_BYTES) throw new FsError('EBUSY', 'busy for the test');
      if (deferring && offset >= DEFERRED_FROM) return DEFER;
      const count = Math.max(0, Math.min(size, DISK_BYTES - offset));
      reply.set(bytes.subarray(offset, offset + count), at);
      return count;
    },
    write(_fh, offset, size, request, at, sync) {
      if (deferring && offset >= DEFERRED_FROM) return DEFER;
      if (offset + size > DISK_BYTES) return -errno.ENOSPC;
      bytes.set(request.subarray(at, at + size), offset);
      mark(offset, size, 1);
      if (sync) Atomics.add(counters, counter.SYNC_WRITES, 1);
      return size;
    },
    seek(_fh, offset, whence) {
      if (offset >= DISK_BYTES) return -errno.ENXIO;
      const found = next(offset, whence === 3 ? 1 : 0);
      if (found >= 0) return found;
      return whence === 3 ? -errno.ENXIO : DISK_BYTES;
    },
    allocate(_fh, offset, length, mode) {
      if (deferring && offset >= DEFERRED_FROM) return DEFER;
      if (offset + length > DISK_BYTES) return -errno.ENOSPC;
      if (mode & (FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE)) bytes.fill(0, offset, offset + length);
      if ((mode & ~(FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE)) !== 0) return -errno.EOPNOTSUPP;
      mark(offset, length, mode & FALLOC_PUNCH_HOLE ? 0 : 1);
      return 0;
    },
    flush() {
      Atomics.add(counters, counter.FLUSHES, 1);
      return 0;
    },
    sync() {
      Atomics.add(counters, counter.SYNCS, 1);
      return 0;
    },
    tidy() {},
  };
}

export function allocatedBytes(disk: MemoryDisk): number {
  let blocks = 0;
  for (const used of new Uint8Array(disk.map)) blocks += used;
  return blocks * BLOCK_BYTES;
}
