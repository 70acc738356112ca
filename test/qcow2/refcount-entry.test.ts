import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { CorruptImage } from '../../src/errors.ts';
import { getRefcount, maxRefcount, setRefcount } from '../../src/qcow2/refcount-entry.ts';

describe('a refcount', () => {
  it.each([
    ['1 bit: from the least significant bit on', 0, [0b1000_0010], [0, 1, 0, 0, 0, 0, 0, 1]],
    ['2 bits: two to a nibble', 1, [0b11_00_10_01], [1, 2, 0, 3]],
    ['4 bits: the low nibble first', 2, [0x5a, 0x0f], [10, 5, 15, 0]],
    ['8 bits', 3, [0xff, 0x01], [255, 1]],
    ['16 bits, big endian', 4, [0x01, 0x02, 0xff, 0xff], [258, 65_535]],
    ['32 bits, big endian', 5, [0x80, 0x00, 0x00, 0x01], [2_147_483_649]],
    ['64 bits, big endian', 6, [0, 0x1f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], [2 ** 53 - 1]],
  ])('of %s', (_rule, order, bytes, expected) => {
    const block = Uint8Array.from(bytes);
    expect(expected.map((_, index) => getRefcount(block, index, order))).toEqual(expected);
    const written = new Uint8Array(bytes.length);
    for (const [index, value] of expected.entries()) setRefcount(written, index, order, value);
    expect([...written]).toEqual(bytes);
  });

  it.each([
    [0, 1],
    [1, 3],
    [2, 15],
    [3, 255],
    [4, 65_535],
    [5, 4_294_967_295],
    [6, Number.MAX_SAFE_INTEGER],
  ])('of 2^%i bits counts to %i', (order, most) => {
    expect(maxRefcount(order)).toBe(most);
  });

  it('of 64 bits above 2^53 is damage', () => {
    const block = Uint8Array.from([0, 0x20, 0, 0, 0, 0, 0, 0]);
    expect(() => getRefcount(block, 0, 6)).toThrow(CorruptImage);
  });

  it('leaves its neighbours alone, whatever its width', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 6 }),
        fc.uint8Array({ minLength: 64, maxLength: 64 }),
        fc.nat(),
        fc.double({ min: 0, max: 1, noNaN: true }),
        (order, bytes, place, fraction) => {
          // Counts of 64 bits stay below 2^53.
          const block = bytes.map((byte, at) => (order === 6 && at % 8 < 2 ? 0 : byte));
          const entries = (64 * 8) / 2 ** order;
          const before = Array.from({ length: entries }, (_, index) => getRefcount(block, index, order));
          const index = place % entries;
          const value = Math.floor(fraction * maxRefcount(order));
          setRefcount(block, index, order, value);
          const after = Array.from({ length: entries }, (_, at) => getRefcount(block, at, order));
          expect(after).toEqual(before.with(index, value));
        },
      ),
    );
  });
});
