import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { deflateRawSync } from 'node:zlib';
import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { CorruptImage } from '../../src/errors.ts';
import { compressCluster, decompressCluster } from '../../src/qcow2/compression.ts';
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
