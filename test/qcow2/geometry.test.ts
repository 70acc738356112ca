import { describe, expect, it } from 'vitest';
import { geometryOf } from '../../src/qcow2/geometry.ts';

const header = {
  version: 3,
  clusterBits: 16,
  extendedL2: false,
  refcountOrder: 4,
  compressionType: 'deflate',
  externalDataFile: false,
  dataFileRaw: false,
  backingFile: undefined,
  writable: true,
} as const;

describe('the geometry of an image', () => {
  it.each([
    // cluster bits, extended, refcount order → span of an L2 table, unit, refcounts per block, slice
    ['64 KiB clusters: 512 MiB to an L2 table', 16, false, 4, 512 * 2 ** 20, 65_536, 32_768, 4096],
    ['512-byte clusters: 32 KiB to an L2 table, a slice is a table', 9, false, 4, 32_768, 512, 256, 512],
    ['2 MiB clusters: 512 GiB to an L2 table', 21, false, 4, 2 ** 39, 2 ** 21, 2 ** 20, 4096],
    ['extended L2: half the span, units of a 32nd', 16, true, 4, 256 * 2 ** 20, 2048, 32_768, 4096],
    ['refcounts of 1 bit', 16, false, 0, 512 * 2 ** 20, 65_536, 524_288, 4096],
    ['refcounts of 64 bits', 16, false, 6, 512 * 2 ** 20, 65_536, 8192, 4096],
  ])('%s', (_rule, clusterBits, extendedL2, refcountOrder, span, unit, perBlock, slice) => {
    const geometry = geometryOf({ ...header, clusterBits, extendedL2, refcountOrder });
    expect([geometry.l2SpanBytes, geometry.unitBytes, geometry.refcountsPerBlock, geometry.sliceBytes]).toEqual([
      span,
      unit,
      perBlock,
      slice,
    ]);
  });

  it('is of raw data only with an external data file', () => {
    expect(geometryOf({ ...header, dataFileRaw: true }).rawData).toBe(false);
    expect(geometryOf({ ...header, externalDataFile: true, dataFileRaw: true }).rawData).toBe(true);
  });
});
