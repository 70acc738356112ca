import { describe, expect, it } from 'vitest';
import { CorruptImage, FsError } from '../../src/errors.ts';
import {
  checkL1Entry,
  compressedBytes,
  compressedOffset,
  hasHost,
  hostOf,
  isCompressed,
  isCopied,
  kind,
  kindOf,
  subclusterKind,
} from '../../src/qcow2/l2-entry.ts';

describe('an L2 entry', () => {
  it.each([
    ['all zeros: unallocated', 0x0000_0000, 0x0000_0000, kind.UNALLOCATED, 0, false],
    ['zero flag alone: zeros, no host cluster', 0x0000_0000, 0x0000_0001, kind.ZERO, 0, false],
    ['zero flag over a cluster: zeros, preallocated', 0x8000_0000, 0x0005_0001, kind.ZERO, 0x5_0000, true],
    ['COPIED: may be overwritten in place', 0x8000_0000, 0x0005_0000, kind.DATA, 0x5_0000, true],
    ['no COPIED: must be copied first', 0x0000_0000, 0x0005_0000, kind.DATA, 0x5_0000, false],
    ['bits 32 to 52 belong to the offset', 0x801f_ffff, 0xffff_fe00, kind.DATA, 2 ** 53 - 512, true],
  ])('%s', (_rule, high, low, expected, host, copied) => {
    expect([kindOf(high, low, 3), hostOf(high, low), isCopied(high)]).toEqual([expected, host, copied]);
  });

  it.each([
    ['bit 1', 0x0000_0000, 0x0005_0002],
    ['bit 8', 0x8000_0000, 0x0005_0100],
    ['bit 56', 0x8100_0000, 0x0005_0000],
    ['bit 61', 0x2000_0000, 0x0005_0000],
  ])('with reserved %s is damage', (_rule, high, low) => {
    expect(() => kindOf(high, low, 3)).toThrow(CorruptImage);
  });

  it('has no zero flag in version 2', () => {
    expect(() => kindOf(0, 1, 2)).toThrow(CorruptImage);
    expect(kindOf(0x8000_0000, 0x0005_0000, 2)).toBe(kind.DATA);
  });

  it('above 2^53 is refused by its offset', () => {
    expect(() => hostOf(0x8020_0000, 0)).toThrow(expect.objectContaining({ errno: 'EFBIG' }));
    expect(() => hostOf(0x8020_0000, 0)).toThrow(FsError);
  });

  it('with data in another file: COPIED alone is host offset 0', () => {
    expect(kindOf(0x8000_0000, 0, 3, true)).toBe(kind.DATA);
    expect(kindOf(0x8000_0000, 0, 3, false)).toBe(kind.UNALLOCATED);
    expect(hasHost(0, 0, true)).toBe(false);
  });
});

describe('an L1 entry', () => {
  it.each([
    ['COPIED and an offset', 0x8000_0000, 0x0003_0000],
    ['an offset alone', 0x0000_0001, 0x0003_0000],
  ])('%s is right', (_rule, high, low) => {
    expect(() => checkL1Entry(high, low, 5)).not.toThrow();
  });

  it.each([
    ['bit 0', 0x8000_0000, 0x0003_0001],
    ['bit 8', 0x8000_0000, 0x0003_0100],
    ['bit 56', 0x8100_0000, 0x0003_0000],
    ['bit 62', 0xc000_0000, 0x0003_0000],
  ])('with reserved %s is damage, told with its index', (_rule, high, low) => {
    expect(() => checkL1Entry(high, low, 5)).toThrow(/L1 entry 5 is 0x/);
  });
});

describe('an extended L2 entry', () => {
  const at = { high: 0x8000_0000, low: 0x0005_0000 };

  it.each([
    ['allocated bit: data', at.high, at.low, 0, 1 << 3, kind.DATA],
    ['zero bit: zeros', at.high, at.low, 1 << 3, 0, kind.ZERO],
    ['neither: unallocated, although the cluster has a place', at.high, at.low, 0, 0, kind.UNALLOCATED],
    ['bits of others do not count', at.high, at.low, 1 << 4, 1 << 2, kind.UNALLOCATED],
    ['zero bit without a cluster: zeros', 0, 0, 1 << 3, 0, kind.ZERO],
    ['compressed: all of it', 0x4000_0000, at.low, 0, 0, kind.COMPRESSED],
  ])('subcluster 3, %s', (_rule, high, low, zero, allocated, expected) => {
    expect(subclusterKind(high, low, zero, allocated, 3)).toBe(expected);
  });

  it('tells the last subcluster from the others', () => {
    expect(subclusterKind(at.high, at.low, 0, 0x8000_0000, 31)).toBe(kind.DATA);
    expect(subclusterKind(at.high, at.low, 0x8000_0000, 0, 31)).toBe(kind.ZERO);
  });

  it.each([
    ['a subcluster both zero and allocated', at.high, at.low, 2, 2],
    ['allocated subclusters without a cluster', 0, 0, 0, 1],
    ['the zero flag of standard entries', at.high, at.low | 1, 0, 1],
    ['a compressed cluster with a bitmap', 0x4000_0000, at.low, 0, 1],
    ['a reserved bit', at.high | 0x0100_0000, at.low, 0, 1],
  ])('%s is damage', (_rule, high, low, zero, allocated) => {
    expect(() => subclusterKind(high, low, zero, allocated, 0)).toThrow(CorruptImage);
  });
});

describe('a compressed cluster descriptor', () => {
  it.each([
    // With 64 KiB clusters bits 54 to 61 count further sectors of 512 bytes.
    ['64 KiB clusters, no further sector', 16, 0x4000_0000, 0x0005_0000, 0x5_0000, 512],
    ['64 KiB clusters, one further sector', 16, 0x4040_0000, 0x0005_0000, 0x5_0000, 1024],
    ['from the middle of a sector to the end of the last', 16, 0x4040_0000, 0x0005_0100, 0x5_0100, 768],
    ['64 KiB clusters, all sectors', 16, 0x7fc0_0000, 0x0000_0200, 0x200, 256 * 512],
    // With 512-byte clusters bit 61 alone does.
    ['512-byte clusters', 9, 0x6000_0000, 0x0000_0400, 0x400, 1024],
    // With 2 MiB clusters bits 49 to 61 do, and the offset has 49 bits.
    ['2 MiB clusters', 21, 0x4002_0000, 0x0000_0600, 0x600, 1024],
    ['2 MiB clusters, a high offset', 21, 0x4001_0000, 0x0000_0000, 2 ** 48, 512],
  ])('%s', (_rule, clusterBits, high, low, offset, bytes) => {
    expect(isCompressed(high)).toBe(true);
    expect(compressedOffset(high, low, clusterBits)).toBe(offset);
    expect(compressedBytes(high, low, clusterBits)).toBe(bytes);
  });
});
