import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { zeroRange } from '../../src/qcow2/discard.ts';
import { WRITTEN_BITS } from '../../src/qcow2/image.ts';
import { writeRange } from '../../src/qcow2/write.ts';
import { noteWritten, stopTracking, takeWritten, trackWrites, writtenBytes } from '../../src/qcow2/written-map.ts';
import { formatted, openSession } from './model.ts';

const CLUSTER = 512;

describe('the map of written parts', () => {
  it('tells what was written, in whole clusters, once', () => {
    const size = 300 * CLUSTER + CLUSTER / 2;
    const range = fc.tuple(fc.integer({ min: 0, max: size - 1 }), fc.integer({ min: 1, max: 40 * CLUSTER }));
    fc.assert(
      fc.property(fc.array(range, { maxLength: 10 }), (ranges) => {
        const { image } = openSession(formatted({ size, clusterBytes: CLUSTER }));
        trackWrites(image);
        const expected = new Set<number>();
        for (const [from, length] of ranges) {
          const end = Math.min(size, from + length);
          noteWritten(image, from, end);
          for (let cluster = Math.floor(from / CLUSTER); cluster * CLUSTER < end; cluster++) expected.add(cluster);
        }
        expect(writtenBytes(image)).toBe(expected.size * CLUSTER);
        const found: number[] = [];
        for (const { from, to } of takeWritten(image)) {
          expect(to).toBeLessThanOrEqual(image.virtualSize());
          for (let cluster = from / CLUSTER; cluster * CLUSTER < to; cluster++) found.push(cluster);
        }
        expect(found).toEqual([...expected].sort((a, b) => a - b));
        expect([...takeWritten(image)]).toEqual([]);
      }),
    );
  });

  it('is filled by writes and discards, and by nothing when it is off', () => {
    const { image } = openSession(formatted({ size: 100 * CLUSTER, clusterBytes: CLUSTER }));
    const byte = Uint8Array.of(1);
    writeRange(image, byte, 0, 1, 0);
    trackWrites(image);
    writeRange(image, byte, 0, 1, 5 * CLUSTER + 7);
    zeroRange(image, 9 * CLUSTER, 2 * CLUSTER, 'free');
    expect([...takeWritten(image)]).toEqual([
      { from: 5 * CLUSTER, to: 6 * CLUSTER },
      { from: 9 * CLUSTER, to: 11 * CLUSTER },
    ]);
    stopTracking(image);
    writeRange(image, byte, 0, 1, 0);
    expect([...takeWritten(image)]).toEqual([]);
    trackWrites(image);
    expect([...takeWritten(image)]).toEqual([]);
  });

  it('keeps what is not taken when the taker stops', () => {
    const { image } = openSession(formatted({ size: 100 * CLUSTER, clusterBytes: CLUSTER }));
    trackWrites(image);
    for (const cluster of [1, 3, 5]) noteWritten(image, cluster * CLUSTER, (cluster + 1) * CLUSTER);
    expect(takeWritten(image).next().value).toEqual({ from: CLUSTER, to: 2 * CLUSTER });
    expect([...takeWritten(image)].map(({ from }) => from / CLUSTER)).toEqual([3, 5]);
  });

  it('grows coarser with the disk, not larger', () => {
    const size = WRITTEN_BITS * 3 * CLUSTER;
    const { image } = openSession(formatted({ size, clusterBytes: CLUSTER }));
    trackWrites(image);
    noteWritten(image, size - 1, size);
    noteWritten(image, 0, 1);
    expect([...takeWritten(image)]).toEqual([
      { from: 0, to: 4 * CLUSTER },
      { from: size - 4 * CLUSTER, to: size },
    ]);
  });
});
