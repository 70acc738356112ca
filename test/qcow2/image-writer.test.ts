/** An image written from front to back is one that this engine and qemu-img read as it was meant. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { checkImage } from '../../src/qcow2/check.ts';
import { compressorFor } from '../../src/qcow2/compressor.ts';
import { type CompressionType, readHeader } from '../../src/qcow2/header.ts';
import { ImageWriter } from '../../src/qcow2/image-writer.ts';
import { readRange } from '../../src/qcow2/read.ts';
import { propertyRuns } from '../property-runs.ts';
import { MemoryStorage } from '../storage/memory-storage.ts';
import { openSession, patternBacking, qemuCheck } from './model.ts';

type Cluster = 'absent' | 'zeros' | 'data' | 'compressed' | 'dense';

/** What a cluster of that kind holds; `dense` is compressed data of nearly a cluster's length. */
function bytesOf(kind: Cluster, clusterBytes: number, seed: number): Uint8Array {
  let state = seed + 1;
  const random = (): number => (state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0) >>> 24;
  if (kind === 'compressed') return new Uint8Array(clusterBytes).fill(1 + (seed % 255));
  return new Uint8Array(clusterBytes).map((_, index) => (kind === 'dense' && index % 16 === 0 ? 7 : random()));
}

async function expectSame(
  clusterBytes: number,
  type: CompressionType,
  kinds: readonly Cluster[],
  backed: boolean,
): Promise<void> {
  const size = Math.max(512, kinds.length * clusterBytes - 512);
  const backing = backed ? patternBacking(size) : undefined;
  const expected = new Uint8Array(Math.max(1, kinds.length) * clusterBytes);
  if (backing !== undefined) expected.set(backing.content);
  const storage = new MemoryStorage();
  const image = new ImageWriter(storage, {
    size,
    clusterBytes,
    compressionType: type,
    ...(backed ? { backing: { file: 'b', format: 'raw' as const } } : {}),
  });
  const compress = await compressorFor(type);
  for (const [index, kind] of kinds.entries()) {
    const guest = index * clusterBytes;
    if (kind === 'absent') continue;
    const bytes = kind === 'zeros' ? new Uint8Array(clusterBytes) : bytesOf(kind, clusterBytes, index);
    expected.set(bytes, guest);
    const compressed = kind === 'data' || kind === 'zeros' ? undefined : await compress(bytes);
    if (kind === 'zeros') image.zeros(clusterBytes, guest);
    else if (compressed === undefined) image.data(bytes, 0, clusterBytes, guest);
    else image.compressed(compressed, guest);
  }
  image.finish();
  expect(await checkImage(storage, readHeader(storage))).toMatchObject({ corruptions: 0, leaks: 0 });
  qemuCheck(storage);
  const found = new Uint8Array(size);
  readRange(openSession(storage, storage, backing).image, undefined, found, 0, size, 0);
  expect(Buffer.compare(found, expected.subarray(0, size))).toBe(0);
}

const kinds = fc.array(fc.constantFrom<Cluster>('absent', 'zeros', 'data', 'compressed', 'dense'), { maxLength: 200 });

describe.each([512, 4096, 65536])('clusters of %i bytes', (clusterBytes) => {
  it.each(['deflate', 'zstd'] as const)('%s', async (type) => {
    const few = { maxLength: clusterBytes === 65536 ? 24 : 200 };
    await fc.assert(
      fc.asyncProperty(kinds, fc.boolean(), (list, backed) =>
        expectSame(clusterBytes, type, list.slice(0, few.maxLength), backed),
      ),
      { numRuns: propertyRuns(8) },
    );
  });
});

it('is no image before it is finished', () => {
  const storage = new MemoryStorage();
  const image = new ImageWriter(storage, { size: 65536, clusterBytes: 65536 });
  image.data(new Uint8Array(65536), 0, 65536, 0);
  expect(() => readHeader(storage)).toThrow('not a qcow2 image');
});

it('refuses a disk that its clusters cannot map', () => {
  expect(() => new ImageWriter(new MemoryStorage(), { size: 2 ** 40, clusterBytes: 512 })).toThrow('too large');
});
