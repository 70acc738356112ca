import { describe, expect, it } from 'vitest';
import { zeroRange } from '../../src/qcow2/discard.ts';
import type { Image } from '../../src/qcow2/image.ts';
import { imageLayer, type OwnExtent, ownExtents, rawLayer } from '../../src/qcow2/own-extents.ts';
import { readSnapshotL1 } from '../../src/qcow2/snapshots.ts';
import { takeSnapshot } from '../../src/qcow2/take-snapshot.ts';
import { writeRange } from '../../src/qcow2/write.ts';
import { MemoryStorage, PAGE_BYTES } from '../storage/memory-storage.ts';
import { formatted, openSession, patternBacking } from './model.ts';

const KIB = 1024;
const bytes = (length: number): Uint8Array => new Uint8Array(length).fill(1);
const write = (image: Image, from: number, to: number): void =>
  void writeRange(image, bytes(to - from), 0, to - from, from);

/** Neighbours of a kind as one: [kind, from, to]. */
function summary(extents: Iterable<OwnExtent>): [string, number, number][] {
  const all: [string, number, number][] = [];
  for (const { kind, offset, length } of extents) {
    const last = all.at(-1);
    if (last?.[0] === kind && last[2] === offset) last[2] = offset + length;
    else all.push([kind, offset, offset + length]);
  }
  return all;
}

describe('own extents', () => {
  it('tell data, zeros and what is unallocated, whatever is below', () => {
    const storage = formatted({ size: 128 * KIB, clusterBytes: 4096, backing: { file: 'b', format: 'raw' } });
    const { image } = openSession(storage, storage, patternBacking(100_000));
    write(image, 10 * KIB, 20 * KIB);
    zeroRange(image, 16 * KIB, 16 * KIB, 'free');
    expect(summary(ownExtents(imageLayer(image), 0, 128 * KIB))).toEqual([
      ['unallocated', 0, 8 * KIB],
      ['data', 8 * KIB, 16 * KIB],
      ['zero', 16 * KIB, 32 * KIB],
      ['unallocated', 32 * KIB, 128 * KIB],
    ]);
    expect(summary(ownExtents(imageLayer(image), 9 * KIB, 2 * KIB))).toEqual([['data', 9 * KIB, 11 * KIB]]);
  });

  it('tell subclusters apart', () => {
    const storage = formatted({ size: 64 * KIB, clusterBytes: 32 * KIB, extendedL2: true });
    const { image } = openSession(storage);
    write(image, 3 * KIB, 4 * KIB);
    write(image, 40 * KIB, 41 * KIB);
    expect(summary(ownExtents(imageLayer(image), 0, 64 * KIB))).toEqual([
      ['unallocated', 0, 3 * KIB],
      ['data', 3 * KIB, 4 * KIB],
      ['unallocated', 4 * KIB, 40 * KIB],
      ['data', 40 * KIB, 41 * KIB],
      ['unallocated', 41 * KIB, 64 * KIB],
    ]);
  });

  it('tell the place in the file, by which two mappings of one image can be compared', async () => {
    const { image, list } = openSession(formatted({ size: 64 * KIB, clusterBytes: 4096 }));
    write(image, 0, 32 * KIB);
    const entry = await takeSnapshot(image, list, { name: 's', timeMs: 0 }, () => {});
    write(image, 8 * KIB, 12 * KIB);
    const snapshot = imageLayer(image, readSnapshotL1(image, entry), entry.virtualSize);
    const places = (layer: ReturnType<typeof imageLayer>): number[] => {
      const found: number[] = [];
      for (const { kind, offset, length, host, hostBytes } of ownExtents(layer, 0, layer.size())) {
        if (kind !== 'data') continue;
        expect(hostBytes).toBe(length);
        for (let done = 0; done < length; done += 4096) found[(offset + done) / 4096] = host + done;
      }
      return found;
    };
    const before = places(snapshot);
    const after = places(imageLayer(image));
    expect(before).toHaveLength(8);
    expect(after.map((host, cluster) => host === before[cluster])).toEqual([
      true,
      true,
      false,
      true,
      true,
      true,
      true,
      true,
    ]);
  });

  it('of a raw file are data and holes', () => {
    const storage = new MemoryStorage();
    storage.truncate(4 * PAGE_BYTES);
    storage.write(bytes(10), 0, 10, PAGE_BYTES + 5);
    expect(summary(ownExtents(rawLayer(storage), 0, 4 * PAGE_BYTES))).toEqual([
      ['zero', 0, PAGE_BYTES],
      ['data', PAGE_BYTES, 2 * PAGE_BYTES],
      ['zero', 2 * PAGE_BYTES, 4 * PAGE_BYTES],
    ]);
  });
});
