import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { CorruptImage } from '../../src/errors.ts';
import { unzstd } from '../../src/qcow2/zstd.ts';
import { propertyRuns } from '../property-runs.ts';
import { MemoryStorage } from './memory-storage.ts';

const folder = mkdtempSync(join(tmpdir(), 'vdskfs-zstd-'));
afterAll(() => rmSync(folder, { recursive: true }));

const BYTES = 4096;
const MAGIC = [0x28, 0xb5, 0x2f, 0xfd];
/** Frame header: window of 1 KiB, no content size, no checksum. */
const HEAD = [...MAGIC, 0x00, 0x00];
/** Block header: last, type (0 raw, 1 RLE, 2 compressed), size. */
const block = (last: 0 | 1, type: number, size: number): number[] => {
  const header = last | (type << 1) | (size << 3);
  return [header & 0xff, (header >>> 8) & 0xff, header >>> 16];
};
const run = (size: number, value = 0x41): number[] => [...HEAD, ...block(1, 1, size), value];
const compressed = (...body: number[]): number[] => [...HEAD, ...block(1, 2, body.length), ...body];

const read = (bytes: readonly number[]): Uint8Array => {
  const target = new Uint8Array(BYTES);
  unzstd(Uint8Array.from(bytes), target);
  return target;
};

describe('zstd data', () => {
  it('may be followed by anything', () => {
    expect(read([...run(BYTES), 9, 9, 9])).toEqual(new Uint8Array(BYTES).fill(0x41));
  });

  it('may come in several frames', () => {
    expect(read([...run(2048), ...run(2048, 0x42)]).subarray(2047, 2049)).toEqual(Uint8Array.of(0x41, 0x42));
  });

  it('may come in several blocks', () => {
    const raw = Array.from({ length: 96 }, (_, index) => index);
    const bytes = read([...HEAD, ...block(0, 0, 96), ...raw, ...block(1, 1, 4000), 7]);
    expect([...bytes.subarray(94, 98)]).toEqual([94, 95, 7, 7]);
  });

  it('may have a skippable frame in front', () => {
    expect(read([0x53, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 7, 7, ...run(BYTES)])[0]).toBe(0x41);
  });

  it('may have a content size and a checksum', () => {
    const head = [...MAGIC, 0x64, 0x00, 0x0f]; // single segment, two bytes of content size less 256, checksum
    expect(read([...head, ...block(1, 1, BYTES), 0x41, 1, 2, 3, 4])[0]).toBe(0x41);
  });

  it('repeats what it has just written: one literal, one match', () => {
    // A raw literal "A"; one sequence, all codes by RLE: literal length 1, offset code 0 (the latest offset, 1),
    // match length 4095 = 2051 + 2044 (code 47, 11 bits), then the end mark.
    const bytes = compressed(0x08, 0x41, 1, 0x54, 1, 0, 47, 2044 & 0xff, (2044 >>> 8) | 0x08);
    expect(read(bytes)).toEqual(new Uint8Array(BYTES).fill(0x41));
  });

  it.each<[string, number[], string]>([
    ['too short', run(BYTES - 1), 'makes 4095 bytes only'],
    ['too long', run(BYTES + 1), 'more than 4096 bytes'],
    ['without magic', [0, 0, 0, 0, 0, 0, 0], 'magic number'],
    ['empty', [], 'makes 0 bytes only'],
    ['cut in the frame header', run(BYTES).slice(0, 4), 'cut after 4 bytes'],
    ['cut in a block header', run(BYTES).slice(0, 8), 'cut after 8 bytes'],
    ['cut in a block', run(BYTES).slice(0, 9), 'cut after 9 bytes'],
    ['cut in its checksum', [...MAGIC, 0x04, 0, ...block(1, 1, BYTES), 7, 1, 2], 'is cut'],
    ['with a skippable frame of 4 GiB', [0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff], 'is cut'],
    ['with the reserved block type', [...HEAD, ...block(1, 3, 0)], 'reserved type'],
    ['with the reserved frame bit', [...MAGIC, 0x08, 0, ...block(1, 1, BYTES), 7], 'reserved bit'],
    ['with a dictionary', [...MAGIC, 1, 0, 5, ...block(1, 1, BYTES), 7], 'dictionary'],
    ['with an empty compressed block', [...HEAD, ...block(1, 2, 0)], 'ends too early'],
    ['with more literals than its block has', compressed(0x40, 1, 2), 'ends too early'],
    ['with treeless literals in the first block', compressed(0x13, 0x40, 0, 0x80, 0), 'without a Huffman table'],
    ['that repeats a table in the first block', compressed(0x08, 0x41, 1, 0xfc, 0x80), 'repeats a table'],
    ['with reserved symbol modes', compressed(0x08, 0x41, 1, 0x55, 1, 0, 47, 0x80), 'symbol modes'],
    ['whose match is before the start', compressed(0x08, 0x41, 1, 0x54, 1, 4, 0, 0x1f), 'further back'],
    ['whose sequences end too early', compressed(0x08, 0x41, 2, 0x54, 1, 0, 47, 0x80), 'too early'],
    ['whose sequences leave bits', compressed(0x08, 0x41, 1, 0x54, 1, 0, 0, 0x80), 'follows the sequences'],
    ['whose bit stream has no end mark', compressed(0x08, 0x41, 1, 0x54, 1, 0, 0, 0), 'no end mark'],
    ['that writes 98,302 matches of 64 KiB', compressed(0, 255, 0xff, 0xff, 0x54, 0, 0, 52, 1, 2, 3, 0x80), 'damaged'],
  ])('%s is refused', (_rule, source, message) => {
    expect(() => read(source)).toThrow(CorruptImage);
    expect(() => read(source)).toThrow(message);
  });
});

describe('clusters compressed by qemu-img', () => {
  /** The compressed bytes of one cluster of 64 KiB of text, numbers and noise. */
  const frame = (): Uint8Array => {
    const raw = join(folder, 'damage.raw');
    const path = join(folder, 'damage.qcow2');
    const text = Array.from({ length: 9000 }, (_, index) => `${index % 97} ${Math.imul(index, 2654435761) >>> 20},`);
    writeFileSync(raw, text.join('').slice(0, 65536));
    execFileSync('qemu-img', ['convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', 'compression_type=zstd', raw, path]);
    const file = MemoryStorage.load(path).bytes();
    return file.slice(Buffer.from(file).indexOf(Uint8Array.from(MAGIC)));
  };

  it('damaged anywhere give a cluster or CorruptImage, nothing else', () => {
    const sound = frame();
    unzstd(sound, new Uint8Array(65536));
    fc.assert(
      fc.property(fc.nat(sound.length - 1), fc.nat(255), (at, value) => {
        const bytes = sound.slice();
        bytes[at] = value;
        try {
          unzstd(bytes, new Uint8Array(65536));
        } catch (error) {
          expect(error).toBeInstanceOf(CorruptImage);
        }
      }),
      { numRuns: propertyRuns(500) },
    );
  });

  it('cut anywhere give CorruptImage', () => {
    const sound = frame();
    for (let length = 0; length < 2000; length += 7) {
      expect(() => unzstd(sound.subarray(0, length), new Uint8Array(65536))).toThrow(CorruptImage);
    }
  });
});
