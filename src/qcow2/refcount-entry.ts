/**
 * Entries of a refcount block (qcow2 specification, "Host cluster management"): 2^order bits each, big endian from
 * 8 bits on, packed from the least significant bit of each byte below that. Pure, allocation free.
 */
import { CorruptImage } from '../errors.ts';

/** Largest count that an entry of 2^order bits holds (for 64 bits: what a number holds exactly). */
export const maxRefcount = (order: number): number => (order === 6 ? Number.MAX_SAFE_INTEGER : 2 ** (2 ** order) - 1);

/** @throws CorruptImage for a 64-bit count above 2^53 */
export function getRefcount(block: Uint8Array, index: number, order: number): number {
  switch (order) {
    case 4:
      return ((block[index * 2] as number) << 8) | (block[index * 2 + 1] as number);
    case 3:
      return block[index] as number;
    case 5:
      return word(block, index * 4);
    case 6: {
      const high = word(block, index * 8);
      if (high >>> 21 !== 0)
        throw new CorruptImage(`refcount 0x${high.toString(16)}… is beyond every number of clusters`);
      return high * 2 ** 32 + word(block, index * 8 + 4);
    }
    default: {
      const bits = 1 << order;
      const perByte = 8 / bits;
      const shift = (index % perByte) * bits;
      return ((block[Math.floor(index / perByte)] as number) >>> shift) & ((1 << bits) - 1);
    }
  }
}

/** `value` must be at most `maxRefcount(order)`. */
export function setRefcount(block: Uint8Array, index: number, order: number, value: number): void {
  switch (order) {
    case 4:
      block[index * 2] = value >>> 8;
      block[index * 2 + 1] = value;
      return;
    case 3:
      block[index] = value;
      return;
    case 5:
      putWord(block, index * 4, value);
      return;
    case 6:
      putWord(block, index * 8, Math.floor(value / 2 ** 32));
      putWord(block, index * 8 + 4, value);
      return;
    default: {
      const bits = 1 << order;
      const perByte = 8 / bits;
      const at = Math.floor(index / perByte);
      const shift = (index % perByte) * bits;
      const mask = ((1 << bits) - 1) << shift;
      block[at] = ((block[at] as number) & ~mask) | (value << shift);
    }
  }
}

const word = (block: Uint8Array, at: number): number =>
  (((block[at] as number) << 24) |
    ((block[at + 1] as number) << 16) |
    ((block[at + 2] as number) << 8) |
    (block[at + 3] as number)) >>>
  0;

function putWord(block: Uint8Array, at: number, value: number): void {
  block[at] = value >>> 24;
  block[at + 1] = value >>> 16;
  block[at + 2] = value >>> 8;
  block[at + 3] = value;
}
