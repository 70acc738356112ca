/**
 * The live L1 table in the file, block by block. A table that was never written may be a hole, and a flush must not be the
 * first to find that the host has no room for it: what it brings to the file was acknowledged long before. So the block of
 * an L2 table's entry is written, as the zeros that it is, before the table is made; and a flush leaves out blocks of
 * nothing but zeros, since no entry ever becomes 0 again.
 */
import type { Image } from './image.ts';
import { number } from './image.ts';

/** What hosts allocate at once, at least. */
const BLOCK_BYTES = 4096;
const ZEROS = new Uint8Array(BLOCK_BYTES);

/**
 * Before the first entry of its block is set: the host has room for the block. With the mutex held.
 * @throws FsError ENOSPC
 */
export function makeRoomForL1Entry(image: Image, l1Index: number): void {
  const { l1, numbers } = image;
  const table = numbers[number.L1_OFFSET] as number;
  const at = table + l1Index * 8;
  const start = Math.max(table, at - (at % BLOCK_BYTES));
  const end = Math.min(table + (numbers[number.L1_ENTRIES] as number) * 8, at - (at % BLOCK_BYTES) + BLOCK_BYTES);
  const block = new Uint8Array(l1.buffer, l1.byteOffset + (start - table), end - start);
  if (isZero(block)) image.file.write(ZEROS, 0, block.length, start);
}

/** Bring entries to the file. @param position host offset of the first one */
export function writeL1Entries(image: Image, entries: Uint8Array, position: number): void {
  let from = 0;
  for (let at = 0; at < entries.length; ) {
    const end = Math.min(entries.length, at + BLOCK_BYTES - ((position + at) % BLOCK_BYTES));
    if (isZero(entries.subarray(at, end))) {
      if (from < at) image.file.write(entries, from, at - from, position + from);
      from = end;
    }
    at = end;
  }
  if (from < entries.length) image.file.write(entries, from, entries.length - from, position + from);
}

/** Of a block at most. */
const isZero = (bytes: Uint8Array): boolean => Buffer.compare(bytes, ZEROS.subarray(0, bytes.length)) === 0;
