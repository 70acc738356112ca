import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { FrozenImage, type FrozenLayer } from '../../src/qcow2/frozen-layer.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import { type Backing, frozenTables } from '../../src/qcow2/image.ts';
import { createMapping, MergedLayers } from '../../src/qcow2/merged-mapping.ts';
import { openImage } from '../../src/qcow2/open-image.ts';
import { propertyRuns } from '../property-runs.ts';
import { MemoryStorage } from '../storage/memory-storage.ts';
import { buildChain, type Change, chainFormats, changes, type File, openChain } from './chains.ts';
import { formatted } from './model.ts';

function frozen({ format, storage }: Pick<File, 'format' | 'storage'>): FrozenLayer {
  if ('raw' in format) return { size: storage.size(), image: undefined, data: storage };
  const { shared } = openImage({
    file: storage,
    data: storage,
    backing: undefined,
    header: readHeader(storage),
    snapshots: { entries: [], bytes: 0 },
    writable: false,
    cacheBytes: 0,
  });
  return new FrozenImage(frozenTables(shared), storage, storage);
}

/** All files but the first `below`, merged, over those. */
function merge(files: readonly File[], below = 0): { merged: MergedLayers; again: MergedLayers } {
  const layers = files.slice(below).map(frozen).reverse();
  const geometries = layers.flatMap(({ image }) => (image === undefined ? [] : [image.geometry]));
  const shared = createMapping(geometries, layers[0]?.size ?? 0, 0);
  const backing: Backing | undefined = below === 0 ? undefined : openChain(files.slice(0, below)).at(-1)?.backing;
  // Another thread's object finds what the first one filled in.
  return { merged: new MergedLayers(shared, layers, backing), again: new MergedLayers(shared, layers, backing) };
}

function expectRead(merged: Backing, content: Uint8Array, from: number, to: number): void {
  const found = new Uint8Array(to - from + 2).fill(0xee);
  merged.read(found, 1, to - from, from);
  expect(Buffer.compare(found.subarray(1, -1), content.subarray(from, to))).toBe(0);
  expect([found[0], found.at(-1)]).toEqual([0xee, 0xee]);
}

/** What is said to hold no data reads as zeros, and the extents cover everything. */
function expectExtents(merged: Backing, content: Uint8Array): void {
  let position = 0;
  while (position < content.length) {
    const { data, length } = merged.extentAt(position, content.length - position);
    expect(length).toBeGreaterThan(0);
    if (!data) expect(content.subarray(position, position + length).every((byte) => byte === 0)).toBe(true);
    position += length;
  }
  expect(position).toBe(content.length);
}

describe('a merged mapping', () => {
  it.each(chainFormats)('reads as the chain does: $name', ({ formats }) => {
    fc.assert(
      fc.property(
        fc.tuple(...formats.map(() => changes(8))),
        fc.array(fc.tuple(fc.double({ min: 0, max: 1, noNaN: true }), fc.double({ min: 0, max: 1, noNaN: true })), {
          maxLength: 8,
        }),
        fc.integer({ min: 0, max: formats.length - 1 }),
        (scripts, ranges, below) => {
          const files = buildChain(formats.map((format, index) => ({ format, changes: scripts[index] as Change[] })));
          const { content } = files.at(-1) as File;
          const { merged, again } = merge(files, below);
          expect(merged.size()).toBe(content.length);
          for (const [at, length] of ranges) {
            const from = Math.floor(at * content.length);
            expectRead(merged, content, from, from + Math.floor(length ** 3 * (content.length - from)));
          }
          expectRead(again, content, 0, content.length);
          expectExtents(merged, content);
        },
      ),
      { numRuns: propertyRuns(15) },
    );
  });

  it('of many layers, more than the map has room for', () => {
    // 8 slices of 512 pieces of 4 KiB: 16 MiB.
    const format = { size: 24 * 2 ** 20, clusterBytes: 65_536, extendedL2: true };
    const layers = Array.from({ length: 20 }, (_, index) => ({
      format,
      changes: Array.from(
        { length: 3 },
        (_, write): Change => ({
          do: 'write',
          at: ((index * 37 + write * 11) % 97) / 97,
          length: 0.3,
          byte: index + 1,
        }),
      ),
    }));
    const files = buildChain(layers);
    const { content } = files.at(-1) as File;
    const { merged, again } = merge(files);
    for (let turn = 0; turn < 2; turn++) {
      for (let from = 0; from < content.length; from += 2 ** 20) {
        expectRead(turn === 0 ? merged : again, content, from, Math.min(content.length, from + 100_000));
      }
    }
  });

  it.each([512, 4096, 65_536])(
    'with compressed clusters in every layer: clusters of %i bytes at the bottom',
    (clusterBytes) => {
      const folder = mkdtempSync(join(tmpdir(), 'vdskfs-merged-'));
      try {
        const run = (command: string, ...args: string[]) => execFileSync(command, args, { cwd: folder, stdio: 'pipe' });
        const names = ['a', 'b', 'c'];
        for (const [index, name] of names.entries()) {
          const below = index === 0 ? [] : ['-b', names[index - 1] as string, '-F', 'qcow2'];
          const bytes = index === 0 ? clusterBytes : 65_536;
          run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', `cluster_size=${bytes}`, ...below, name, '2M');
          run(
            'qemu-io',
            '-c',
            `write -c -P ${index + 1} ${index * 320}k 512k`,
            '-c',
            `write -P 9 ${index * 100 + 50}k 5k`,
            name,
          );
        }
        run('qemu-img', 'convert', '-O', 'raw', 'c', 'raw');
        const files = names.map((name) => ({
          format: { size: 0 },
          storage: MemoryStorage.load(join(folder, name)),
          content: new Uint8Array(),
        }));
        const { merged } = merge(files);
        const content = new Uint8Array(readFileSync(join(folder, 'raw')));
        for (let from = 0; from < content.length; from += 30_011)
          expectRead(merged, content, from, Math.min(from + 9000, content.length));
        expectRead(merged, content, 0, content.length);
        expectExtents(merged, content);
      } finally {
        rmSync(folder, { recursive: true });
      }
    },
  );

  it('passes far over what no layer maps', () => {
    const empty = (size: number): File => {
      const format = { size, clusterBytes: 2 ** 21 };
      return { format, storage: formatted(format), content: new Uint8Array() };
    };
    const { merged } = merge([empty(2 ** 50), empty(2 ** 30), empty(2 ** 50)]);
    let position = 0;
    let asked = 0;
    for (; position < 2 ** 50; asked++) position += merged.extentAt(position, 2 ** 50 - position).length;
    expect(asked).toBeLessThan(10);
  });

  it('tells of a damaged entry where that is read, and nowhere else', () => {
    const format = { size: 2 ** 20, clusterBytes: 4096 };
    const written: Change = { do: 'write', at: 0, length: 1, byte: 3 };
    const files = buildChain([
      { format, changes: [written] },
      { format, changes: [written] },
    ]);
    const top = files[1] as File;
    const l2 = Number(l1Of(top.storage).getBigUint64(0) & 0x00ff_ffff_ffff_fe00n);
    top.storage.write(Uint8Array.of(0x80, 0, 0, 0, 0, 0, 0x10, 0x02), 0, 8, l2 + 5 * 8);
    const { merged } = merge(files);
    const buffer = new Uint8Array(4096);
    merged.read(buffer, 0, 4096, 4 * 4096);
    expect(buffer.every((byte) => byte === 3)).toBe(true);
    expect(() => merged.read(buffer, 0, 4096, 5 * 4096)).toThrow(/reserved bits/);
    merged.read(buffer, 0, 4096, 6 * 4096);
  });
});

function l1Of(storage: MemoryStorage): DataView {
  const { l1TableOffset } = readHeader(storage);
  const bytes = new Uint8Array(8);
  storage.read(bytes, 0, 8, l1TableOffset);
  return new DataView(bytes.buffer);
}
