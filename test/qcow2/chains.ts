/** Random chains of images in memory, and the plain arrays that they must agree with. */
import fc from 'fast-check';
import { expect } from 'vitest';
import type { FormatOptions } from '../../src/qcow2/create.ts';
import { zeroRange } from '../../src/qcow2/discard.ts';
import type { Backing, Image } from '../../src/qcow2/image.ts';
import { imageBacking, rawBacking } from '../../src/qcow2/layer.ts';
import { imageLayer, type OwnLayer, rawLayer } from '../../src/qcow2/own-extents.ts';
import { readRange } from '../../src/qcow2/read.ts';
import { writeRange } from '../../src/qcow2/write.ts';
import type { Storage } from '../../src/storage/storage.ts';
import { MemoryStorage } from '../storage/memory-storage.ts';
import { closeSession, formatted, openSession } from './model.ts';

export type LayerFormat = { readonly raw: number } | Omit<FormatOptions, 'backing'>;

/** Places are fractions of the layer's disk. */
export interface Change {
  readonly do: 'write' | 'discard' | 'zero';
  readonly at: number;
  readonly length: number;
  readonly byte: number;
}

const fraction = fc.double({ min: 0, max: 1, noNaN: true });

export const changes = (most: number): fc.Arbitrary<Change[]> =>
  fc.array(
    fc.record({
      do: fc.constantFrom('write', 'write', 'write', 'discard', 'zero'),
      at: fraction,
      length: fraction,
      // Also zeros that are data.
      byte: fc.integer({ min: 0, max: 255 }),
    }),
    { maxLength: most },
  );

/** A file of the chain at rest, with what the chain from it down holds. */
export interface File {
  readonly format: LayerFormat;
  readonly storage: MemoryStorage;
  readonly content: Uint8Array;
}

/** Do the change to engine and array. */
export function change(image: Image, content: Uint8Array, { do: what, at, length, byte }: Change): void {
  const from = Math.floor(at * (content.length - 1));
  const bytes = Math.max(1, Math.floor(length ** 3 * (content.length - from)));
  if (what === 'write') {
    const data = new Uint8Array(bytes).fill(byte);
    expect(writeRange(image, data, 0, bytes, from)).toBe(true);
    content.set(data, from);
  } else {
    expect(zeroRange(image, from, bytes, what === 'discard' ? 'free' : 'keep')).toBe(true);
    content.fill(0, from, from + bytes);
  }
}

/** @param layers bottom first, each with what is done to it before the next one is put over it */
export function buildChain(layers: readonly { format: LayerFormat; changes: readonly Change[] }[]): File[] {
  const files: File[] = [];
  for (const { format, changes: done } of layers) {
    if ('raw' in format) {
      const content = new Uint8Array(format.raw);
      const storage = new MemoryStorage();
      storage.truncate(format.raw);
      for (const { do: what, at, length, byte } of done) {
        const from = Math.floor(at * (content.length - 1));
        const end = from + Math.max(1, Math.floor(length ** 3 * (content.length - from)));
        content.fill(what === 'write' ? byte : 0, from, end);
        storage.write(content, from, end - from, from);
      }
      files.push({ format, storage, content });
      continue;
    }
    const below = files.at(-1);
    const storage = formatted({ ...format, ...(below && { backing: { file: 'b', format: 'raw' as const } }) });
    const content = new Uint8Array(Math.ceil(format.size / 512) * 512);
    if (below !== undefined) content.set(below.content.subarray(0, content.length));
    const opened = openChain([...files, { format, storage, content }]);
    for (const one of done) change(opened.at(-1)?.image as Image, content, one);
    closeChain(opened);
    files.push({ format, storage, content });
  }
  return files;
}

export interface Opened {
  readonly storage: Storage;
  /** Undefined for a raw file. */
  readonly image: Image | undefined;
  readonly backing: Backing;
  readonly layer: OwnLayer;
}

/** All files open, the images for writing; bottom first. */
export function openChain(files: readonly { readonly format: LayerFormat; readonly storage: Storage }[]): Opened[] {
  const opened: Opened[] = [];
  for (const { format, storage } of files) {
    if ('raw' in format) {
      opened.push({ storage, image: undefined, backing: rawBacking(storage), layer: rawLayer(storage) });
    } else {
      const { image } = openSession(storage, storage, opened.at(-1)?.backing);
      opened.push({ storage, image, backing: imageBacking(image), layer: imageLayer(image) });
    }
  }
  return opened;
}

export function closeChain(opened: readonly Opened[]): void {
  for (const { image, storage } of opened)
    if (image !== undefined) closeSession({ image, storage, list: undefined as never });
}

/** All bytes of the disk. */
export function readAll(image: Image): Uint8Array {
  const bytes = new Uint8Array(image.virtualSize());
  readRange(image, undefined, bytes, 0, bytes.length, 0);
  return bytes;
}

/** @throws with the first byte that differs */
export function expectContent(image: Image, content: Uint8Array, when: string): void {
  const found = readAll(image);
  expect(found.length, when).toBe(content.length);
  if (Buffer.compare(found, content) === 0) return;
  const at = found.findIndex((byte, index) => byte !== content[index]);
  throw new Error(`${when}: byte ${at} of ${content.length} is ${found[at]}, not ${content[at]}`);
}

const KIB = 1024;

/** Bottom first: what is special about each is in its name. */
export const chainFormats: readonly { readonly name: string; readonly formats: readonly LayerFormat[] }[] = [
  {
    name: 'equal clusters',
    formats: [
      { size: 200 * KIB, clusterBytes: 4096 },
      { size: 200 * KIB, clusterBytes: 4096 },
      { size: 200 * KIB, clusterBytes: 4096 },
    ],
  },
  {
    name: 'the lower has nothing below',
    formats: [
      { size: 100 * KIB, clusterBytes: 512 },
      { size: 100 * KIB, clusterBytes: 2048 },
    ],
  },
  { name: 'a raw lower', formats: [{ raw: 150_000 }, { size: 150_016, clusterBytes: 4096 }] },
  { name: 'a longer upper over raw', formats: [{ raw: 100_000 }, { size: 300_032, clusterBytes: 4096 }] },
  { name: 'a shorter upper over raw', formats: [{ raw: 300_032 }, { size: 100_352, clusterBytes: 4096 }] },
  {
    name: 'small clusters over large ones over raw',
    formats: [{ raw: 500_000 }, { size: 600_064, clusterBytes: 65536 }, { size: 600_064, clusterBytes: 512 }],
  },
  {
    name: 'large clusters over small ones',
    formats: [{ raw: 500_000 }, { size: 600_064, clusterBytes: 512 }, { size: 600_064, clusterBytes: 65536 }],
  },
  {
    name: 'subclusters over subclusters',
    formats: [
      { size: 300_032, clusterBytes: 4096 },
      { size: 400_384, clusterBytes: 16384, extendedL2: true },
      { size: 400_384, clusterBytes: 32768, extendedL2: true },
    ],
  },
  {
    name: 'version 2, which has no zeros',
    formats: [
      { size: 150_016, version: 2, clusterBytes: 1024 },
      { size: 150_016, version: 2, clusterBytes: 4096 },
      { size: 150_016, version: 2, clusterBytes: 1024 },
    ],
  },
  {
    name: 'version 2 over version 3 over raw',
    formats: [
      { raw: 90_000 },
      { size: 100_352, clusterBytes: 1024 },
      { size: 120_320, version: 2, clusterBytes: 2048 },
    ],
  },
  {
    name: 'a shorter image between longer ones',
    formats: [
      { size: 300_032, clusterBytes: 4096 },
      { size: 100_352, clusterBytes: 1024 },
      { size: 250_368, clusterBytes: 2048 },
    ],
  },
];
