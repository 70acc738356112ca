import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type ByteSpan, copyToImage, copyToRaw, type Source } from '../../src/disk/copy-out.ts';
import { compressorFor } from '../../src/qcow2/compressor.ts';
import { ImageWriter } from '../../src/qcow2/image-writer.ts';
import { readRange } from '../../src/qcow2/read.ts';
import { propertyRuns } from '../property-runs.ts';
import { openSession, patternBacking, qemuCheck } from '../qcow2/model.ts';
import { MemoryStorage } from '../storage/memory-storage.ts';

const work = {};

/** A disk of runs: data, zeros that are allocated, holes. */
function sourceOf(runs: readonly { readonly kind: 'data' | 'zeros' | 'hole'; readonly length: number }[]) {
  const size = runs.reduce((sum, { length }) => sum + length, 0);
  const bytes = new Uint8Array(size);
  const isData = new Uint8Array(size);
  let at = 0;
  for (const { kind, length } of runs) {
    if (kind === 'data') for (let index = at; index < at + length; index++) bytes[index] = 1 + (index % 251);
    if (kind !== 'hole') isData.fill(1, at, at + length);
    at += length;
  }
  const find = (value: number, offset: number): number => isData.indexOf(value, offset);
  const source: Source = {
    size: () => size,
    read: (target, to, length, offset) => target.set(bytes.subarray(offset, offset + length), to),
    nextData: (offset) => find(1, offset),
    nextHole: (offset) => (find(0, offset) < 0 ? size : find(0, offset)),
  };
  return { source, bytes };
}

const runs = fc.array(
  fc.record({
    kind: fc.constantFrom('data' as const, 'zeros' as const, 'hole' as const),
    length: fc.integer({ min: 1, max: 400 }).map((sectors) => sectors * 512),
  }),
  { minLength: 1, maxLength: 12 },
);

describe('a copy', () => {
  it('to a raw file has the same bytes, and no page of zeros', async () => {
    await fc.assert(
      fc.asyncProperty(runs, async (list) => {
        const { source, bytes } = sourceOf(list);
        const target = new MemoryStorage();
        await copyToRaw(source, target, work);
        expect(target.size()).toBe(bytes.length);
        expect(Buffer.compare(target.bytes(), bytes)).toBe(0);
      }),
      { numRuns: propertyRuns(40) },
    );
  });

  it('to an image has the same bytes, and over a backing file only those of the spans', async () => {
    const compress = await compressorFor('deflate');
    await fc.assert(
      fc.asyncProperty(
        runs,
        fc.option(fc.array(fc.tuple(fc.nat(2000), fc.integer({ min: 1, max: 200 })), { maxLength: 4 })),
        fc.boolean(),
        async (list, pieces, compressed) => {
          const { source, bytes } = sourceOf(list);
          const spans: ByteSpan[] | undefined = pieces
            ?.map(([from, length]) => ({ from: from * 512, to: Math.min(bytes.length, (from + length) * 512) }))
            .filter(({ from, to }) => from < to)
            .sort((a, b) => a.from - b.from);
          const backing = spans === undefined ? undefined : patternBacking(Math.ceil(bytes.length / 1024) * 512);
          const storage = new MemoryStorage();
          const image = new ImageWriter(storage, {
            size: bytes.length,
            clusterBytes: 4096,
            ...(backing === undefined ? {} : { backing: { file: 'b', format: 'raw' as const } }),
          });
          await copyToImage(
            source,
            image,
            {
              ...(spans === undefined ? {} : { spans, backingBytes: backing?.size() ?? 0 }),
              compress: compressed ? compress : undefined,
            },
            work,
          );
          const expected = spans === undefined ? bytes : new Uint8Array(bytes.length);
          expected.set(backing?.content ?? []);
          for (const { from, to } of spans ?? []) {
            const first = from - (from % 4096);
            const end = Math.min(bytes.length, Math.ceil(to / 4096) * 4096);
            expected.set(bytes.subarray(first, end), first);
          }
          const found = new Uint8Array(bytes.length);
          readRange(openSession(storage, storage, backing).image, undefined, found, 0, found.length, 0);
          expect(Buffer.compare(found, expected)).toBe(0);
        },
      ),
      { numRuns: propertyRuns(40) },
    );
  });

  it('ends where it is told to, between two pieces', async () => {
    const { source } = sourceOf([{ kind: 'data', length: 5 * 2 ** 20 }]);
    const controller = new AbortController();
    let pieces = 0;
    const progress = (): void => {
      if (++pieces === 2) controller.abort(new Error('enough'));
    };
    const { signal } = controller;
    await expect(copyToRaw(source, new MemoryStorage(), { progress, signal })).rejects.toThrow('enough');
    expect(pieces).toBe(2);
  });

  it('of an empty disk is an image', async () => {
    const storage = new MemoryStorage();
    await copyToImage(sourceOf([]).source, new ImageWriter(storage, { size: 0, clusterBytes: 65536 }), {}, work);
    qemuCheck(storage);
  });
});
