import { describe, expect, it } from 'vitest';
import { CorruptImage } from '../../src/errors.ts';
import { bitmapClusterOf, decodeBitmapDirectory } from '../../src/qcow2/bitmap-directory.ts';

const CLUSTER = 65536;
const disk = { size: 2 ** 30, clusterBytes: CLUSTER };

/** A bitmap "b": granularity 512 bytes, so 256 KiB of bits in four clusters. */
const entry = Uint8Array.from([
  ...[0, 0, 0, 0, 0, 5, 0, 0], // table at 0x50000
  ...[0, 0, 0, 4], // of four entries
  ...[0, 0, 0, 2], // flags: auto
  ...[1, 9], // dirty tracking, 2^9 bytes per bit
  ...[0, 1], // name of a byte
  ...[0, 0, 0, 0], // no extra data
  ...[0x62, 0, 0, 0, 0, 0, 0, 0], // "b", padding
]);
const changed = (at: number, value: number): Uint8Array => entry.with(at, value);

describe('a bitmap directory', () => {
  it('gives the table of each bitmap', () => {
    const two = Uint8Array.from([...entry, ...changed(5, 6)]);
    expect(decodeBitmapDirectory(two, 2, disk)).toEqual([
      { offset: 0x50000, entries: 4 },
      { offset: 0x60000, entries: 4 },
    ]);
  });

  it('may hold a bitmap of an old size that is marked as in use', () => {
    expect(decodeBitmapDirectory(changed(11, 3).with(15, 3), 1, disk)).toHaveLength(1);
  });

  it.each<[string, Uint8Array, number, string]>([
    ['fewer entries than the header says', entry, 2, 'passes the end'],
    ['an entry that is cut', entry.subarray(0, 20), 1, 'passes the end'],
    ['a name longer than the rest', changed(18, 1), 1, 'passes the end'],
    ['extra data longer than the rest', changed(20, 0xff), 1, 'passes the end'],
    ['an unaligned table', changed(6, 2), 1, 'is no cluster'],
    ['a table at 2^56', changed(0, 1), 1, 'is no cluster'],
    ['a table of 2^27 entries and more', changed(8, 0x10), 1, 'entries'],
    ['a table too small for the disk', changed(11, 3), 1, 'the disk needs 4'],
    ['a table too large for the disk', changed(11, 5), 1, 'the disk needs 4'],
    ['an unknown flag', changed(15, 8), 1, 'flags are 0x8'],
    ['an unknown type', changed(16, 2), 1, 'type is 2'],
    ['a granularity under a sector', changed(17, 8), 1, '8 bits'],
    ['a granularity over 2 GiB', changed(17, 32), 1, '32 bits'],
    ['a bitmap without a name', changed(19, 0), 1, 'name has 0 bytes'],
  ])('with %s is refused', (_rule, bytes, count, message) => {
    expect(() => decodeBitmapDirectory(bytes, count, disk)).toThrow(CorruptImage);
    expect(() => decodeBitmapDirectory(bytes, count, disk)).toThrow(message);
  });
});

describe('a bitmap table entry', () => {
  it.each([
    ['of zeros', 0, 0, 0],
    ['of ones', 0, 1, 0],
    ['with a cluster', 0, 0x50000, 0x50000],
    ['with a cluster above 4 GiB', 2, 0x50000, 2 * 2 ** 32 + 0x50000],
  ])('%s', (_rule, high, low, offset) => {
    expect(bitmapClusterOf(high, low, CLUSTER)).toBe(offset);
  });

  it.each([
    ['with an unaligned cluster', 0, 0x50200],
    ['with a cluster that is all ones as well', 0, 0x50001],
    ['with reserved bits below', 0, 2],
    ['with reserved bits above', 0x0100_0000, 0],
  ])('%s is refused', (_rule, high, low) => {
    expect(() => bitmapClusterOf(high, low, CLUSTER)).toThrow(CorruptImage);
  });
});
