import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { deflateRawSync } from 'node:zlib';
import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { CorruptImage } from '../../src/errors.ts';
import { compressCluster, decompressCluster, zstdFrame } from '../../src/qcow2/compression.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import { compressedBytes, compressedOffset, hostOf, isCompressed } from '../../src/qcow2/l2-entry.ts';
import { MemoryStorage } from './memory-storage.ts';

const folder = mkdtempSync(join(tmpdir(), 'vdskfs-compression-'));
afterAll(() => rmSync(folder, { recursive: true }));

/** Text, runs, counters and noise: each part compresses in another way. */
function mixed(bytes: number): Uint8Array {
  const target = new Uint8Array(bytes);
  let noise = 1;
  for (let at = 0; at < bytes; at++) {
    noise = (Math.imul(noise, 1103515245) + 12345) >>> 0;
    const part = Math.floor(at / 1000) % 8;
    target[at] = [0x20 + (noise >>> 28), 7, at >>> 3, noise >>> 24, at % 251, noise >>> 31, 0, at ^ (at >>> 7)][
      part
    ] as number;
  }
  return target;
}

describe('clusters compressed by qemu-img', () => {
  it.each(['zlib', 'zstd'].flatMap((type) => ['4k', '64k', '2M'].map((cluster) => [type, cluster] as const)))(
    '%s, clusters of %s',
    (type, cluster) => {
      const raw = join(folder, 'source.raw');
      const path = join(folder, `${type}-${cluster}.qcow2`);
      const disk = mixed(5 << 20);
      writeFileSync(raw, disk);
      const options = `compression_type=${type},cluster_size=${cluster}`;
      execFileSync('qemu-img', ['convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', options, raw, path]);
      const storage = MemoryStorage.load(path);
      const header = readHeader(storage);

      let compressed = 0;
      const table = (position: number, bytes: number): DataView => {
        const target = new Uint8Array(bytes);
        storage.read(target, 0, bytes, position);
        return new DataView(target.buffer);
      };
      const l1 = table(header.l1TableOffset, header.l1Entries * 8);
      for (let index = 0; index * header.clusterBytes < disk.length; index++) {
        const perTable = header.clusterBytes / 8;
        const l1At = Math.floor(index / perTable) * 8;
        const l2 = table(hostOf(l1.getUint32(l1At), l1.getUint32(l1At + 4)), header.clusterBytes);
        const high = l2.getUint32((index % perTable) * 8);
        const low = l2.getUint32((index % perTable) * 8 + 4);
        if (!isCompressed(high)) continue;
        compressed++;
        const source = new Uint8Array(compressedBytes(high, low, header.clusterBits));
        const got = storage.read(source, 0, source.length, compressedOffset(high, low, header.clusterBits));
        const target = new Uint8Array(header.clusterBytes).fill(0xee);
        decompressCluster(header.compressionType, source, got, target);
        const expected = new Uint8Array(header.clusterBytes);
        expected.set(disk.subarray(index * header.clusterBytes, (index + 1) * header.clusterBytes));
        expect(Buffer.compare(target, expected), `cluster ${index}`).toBe(0);
      }
      expect(compressed).toBeGreaterThan(0);
    },
  );
});

describe('deflate data', () => {
  const cluster = mixed(4096);
  const data = deflateRawSync(cluster, { windowBits: 12 });
  const read = (source: Uint8Array): Uint8Array => {
    const target = new Uint8Array(cluster.length);
    decompressCluster('deflate', source, source.length, target);
    return target;
  };

  it('may be followed by anything', () => {
    expect(read(Uint8Array.from([...data, 1, 2, 3, 0xff]))).toEqual(cluster);
  });

  it('is read up to the given length only', () => {
    const target = new Uint8Array(cluster.length);
    expect(() => decompressCluster('deflate', data, 100, target)).toThrow('bytes only');
  });

  it.each([
    ['too short', deflateRawSync(cluster.subarray(1)), 'expands to 4095 bytes only'],
    ['too long', deflateRawSync(Uint8Array.from([...cluster, 1])), 'expands to more than its 4096 bytes'],
    ['a bomb', deflateRawSync(new Uint8Array(1 << 24)), 'expands to more than its 4096 bytes'],
    ['no deflate data', Uint8Array.of(0xff, 0xff, 0xff), 'is damaged'],
    ['empty', new Uint8Array(), 'expands to 0 bytes only'],
  ])('%s is refused', (_rule, source, message) => {
    expect(() => read(source)).toThrow(CorruptImage);
    expect(() => read(source)).toThrow(message);
  });

  it('made by compressCluster comes back', () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 512, maxLength: 512 }), fc.nat(511), (bytes, zeros) => {
        bytes.fill(0, 0, zeros);
        const compressed = compressCluster(bytes);
        if (compressed === undefined) return;
        expect(compressed.length).toBeLessThan(512);
        const target = new Uint8Array(512);
        decompressCluster('deflate', compressed, compressed.length, target);
        expect(target).toEqual(bytes);
      }),
    );
  });

  it('that would not be smaller is not made', () => {
    const noise = Buffer.concat(
      Array.from({ length: 8 }, (_, index) => createHash('sha512').update(`${index}`).digest()),
    );
    expect(compressCluster(noise)).toBeUndefined();
  });
});

describe('zstd data', () => {
  const MAGIC = [0x28, 0xb5, 0x2f, 0xfd];
  /** One frame of one block that repeats a byte: single segment, content size in two bytes (less 256). */
  const run = (bytes: number, value = 0x41): number[] => [
    ...MAGIC,
    0x60, // single segment, 2 bytes of content size
    ...[(bytes - 256) & 0xff, (bytes - 256) >>> 8],
    ...[(bytes << 3) | 3, (bytes >>> 5) & 0xff, bytes >>> 13], // last block, RLE
    value,
  ];
  const read = (bytes: readonly number[]): Uint8Array => {
    const target = new Uint8Array(4096);
    decompressCluster('zstd', Uint8Array.from(bytes), bytes.length, target);
    return target;
  };

  it('may be followed by anything', () => {
    expect(read([...run(4096), 9, 9, 9])).toEqual(new Uint8Array(4096).fill(0x41));
  });

  it('may come in several frames', () => {
    expect(read([...run(2048), ...run(2048, 0x42)]).subarray(2047, 2049)).toEqual(Uint8Array.of(0x41, 0x42));
  });

  it('may have a skippable frame in front', () => {
    expect(read([0x53, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 7, 7, ...run(4096)])[0]).toBe(0x41);
  });

  it('says its own length by its block headers', () => {
    expect(zstdFrame(Uint8Array.from([...run(4096), 9, 9]))).toMatchObject({ bytes: 11, windowBytes: 4096 });
  });

  it.each<[string, number[], string]>([
    ['too short', [...run(4095)], 'expands to 4095 bytes only'],
    ['too long', [...run(4097)], 'expands to more than its 4096 bytes'],
    ['without magic', [0, 0, 0, 0, 0, 0, 0], 'magic number'],
    ['empty', [], 'expands to 0 bytes only'],
    ['cut in the frame header', run(4096).slice(0, 6), 'cut after 6 bytes'],
    ['cut in a block', run(4096).slice(0, 10), 'cut after 10 bytes'],
    ['asking for a window of 2 GiB', [...MAGIC, 0, 0xa8, 1, 0, 0], 'window of 2147483648 bytes'],
    ['claiming 2^63 bytes', [...MAGIC, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0x80, 1, 0, 0], 'window of 9223372036854776000'],
    ['with a reserved block type', [...MAGIC, 0, 0, 7, 0, 0], 'reserved type'],
    ['with a dictionary', [...MAGIC, 1, 0, 5, 1, 0, 0], 'dictionary'],
  ])('%s is refused', (_rule, source, message) => {
    expect(() => read(source)).toThrow(CorruptImage);
    expect(() => read(source)).toThrow(message);
  });

  it('damaged anywhere gives a cluster or CorruptImage, nothing else', () => {
    const raw = join(folder, 'damage.raw');
    const path = join(folder, 'damage.qcow2');
    writeFileSync(raw, mixed(4096));
    const options = 'compression_type=zstd,cluster_size=4k';
    execFileSync('qemu-img', ['convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', options, raw, path]);
    const file = MemoryStorage.load(path).bytes();
    const start = Buffer.from(file).indexOf(Uint8Array.from(MAGIC));
    const frame = file.slice(start, start + zstdFrame(file.subarray(start)).bytes);
    fc.assert(
      fc.property(fc.nat(frame.length - 1), fc.nat(255), (at, value) => {
        const bytes = frame.slice();
        bytes[at] = value;
        try {
          decompressCluster('zstd', bytes, bytes.length, new Uint8Array(4096));
        } catch (error) {
          expect(error).toBeInstanceOf(CorruptImage);
        }
      }),
    );
  });
});
