import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { decodeHeader, encodeHeaderCluster, headerAt, headerRecord, readHeader } from '../../src/qcow2/header.ts';
import { encodeExtensions, encodeFeatureNames, extensionType } from '../../src/qcow2/header-extensions.ts';
import { MemoryStorage } from './memory-storage.ts';

const folder = mkdtempSync(join(tmpdir(), 'vdskfs-header-'));
afterAll(() => rmSync(folder, { recursive: true }));

const MAGIC = 0x5146_49fb;
const CLUSTER = 65536;
const FILE_CLUSTERS = 4;

/** Header, refcount table, refcount block, L1 table: an empty disk of 1 GiB. */
const sound = {
  magic: MAGIC,
  version: 3,
  clusterBits: 16,
  size: 1n << 30n,
  l1Entries: 2,
  l1TableOffset: 0x30000n,
  refcountTableOffset: 0x10000n,
  refcountTableClusters: 1,
  refcountOrder: 4,
  headerLength: 112,
};

function image(
  changes: Partial<ReturnType<typeof headerRecord.decode>>,
  variablePart: Uint8Array = new Uint8Array(),
): MemoryStorage {
  const file = new Uint8Array(CLUSTER * FILE_CLUSTERS);
  headerRecord.encode({ ...sound, ...changes }, file);
  file.set(variablePart, 112);
  return new MemoryStorage('disk.qcow2', file);
}

function failureOf(storage: MemoryStorage): string {
  try {
    readHeader(storage);
    return 'accepted';
  } catch (error) {
    if (!(error instanceof FsError)) throw error;
    return `${error.errno} ${error.message}`;
  }
}

describe('the fields of the header', () => {
  it('lie where the specification puts them', () => {
    expect(headerAt).toMatchObject({
      magic: 0,
      version: 4,
      backingFileOffset: 8,
      backingFileBytes: 16,
      clusterBits: 20,
      size: 24,
      cryptMethod: 32,
      l1Entries: 36,
      l1TableOffset: 40,
      refcountTableOffset: 48,
      refcountTableClusters: 56,
      snapshotCount: 60,
      snapshotsOffset: 64,
      incompatible: 72,
      compatible: 80,
      autoclear: 88,
      refcountOrder: 96,
      headerLength: 100,
      compressionType: 104,
    });
  });

  it('are given as checked numbers', () => {
    expect(readHeader(image({}))).toMatchObject({
      version: 3,
      size: 2 ** 30,
      clusterBits: 16,
      clusterBytes: CLUSTER,
      l1Entries: 2,
      l1TableOffset: 0x30000,
      refcountBits: 16,
      compressionType: 'deflate',
      backingFile: undefined,
      bitmaps: undefined,
    });
  });

  it('of version 2 end at byte 72: what follows is no feature', () => {
    const header = readHeader(
      image({ version: 2, incompatible: 0xffn << 8n, refcountOrder: 9, headerLength: 1 }, undefined),
    );
    expect(header).toMatchObject({ version: 2, incompatible: 0n, refcountBits: 16, headerLength: 72 });
  });

  it('behind header_length are not present', () => {
    const storage = image({ headerLength: 104, compressionType: 0 });
    expect(readHeader(storage)).toMatchObject({ headerLength: 104, compressionType: 'deflate' });
  });
});

describe('a file is refused as no qcow2 image', () => {
  it.each([
    ['empty', new Uint8Array(), 'EINVAL disk.qcow2: the file is empty'],
    ['raw', new Uint8Array(512), 'EINVAL disk.qcow2: not a qcow2 image'],
    ['shorter than the magic', Uint8Array.of(0x51, 0x46), 'EINVAL disk.qcow2: not a qcow2 image'],
    ['cut within the header', image({}).bytes().slice(0, 60), 'EINVAL disk.qcow2: the file ends after 60 bytes'],
    ['version 3 cut after 72 bytes', image({}).bytes().slice(0, 90), 'EINVAL disk.qcow2: the file ends after 90 bytes'],
    ['cut before its L1 table', image({}).bytes().slice(0, CLUSTER), 'EIO disk.qcow2: header field l1_table_offset'],
  ])('when it is %s', (_rule, bytes, expected) => {
    expect(failureOf(new MemoryStorage('disk.qcow2', bytes))).toContain(expected);
  });
});

describe('a header is refused', () => {
  it.each<[string, Parameters<typeof image>[0], string]>([
    ['of version 1', { version: 1 }, 'ENOTSUP disk.qcow2: qcow2 version 1'],
    ['of version 4', { version: 4 }, 'ENOTSUP disk.qcow2: qcow2 version 4'],
    ['with clusters of 256 bytes', { clusterBits: 8 }, 'EIO disk.qcow2: header field cluster_bits at byte 20 is 8'],
    ['with clusters of 4 MiB', { clusterBits: 22 }, 'cluster_bits at byte 20 is 22'],
    ['with 2^31 cluster bits', { clusterBits: 2 ** 31 }, 'cluster_bits'],
    ['encrypted with AES', { cryptMethod: 1 }, 'ENOTSUP disk.qcow2: the image is encrypted (AES)'],
    ['encrypted with LUKS', { cryptMethod: 2 }, 'ENOTSUP disk.qcow2: the image is encrypted (LUKS)'],
    ['encrypted with what nobody knows', { cryptMethod: 3 }, 'crypt_method at byte 32 is 3'],
    ['with a disk of 2^63 bytes', { size: 1n << 63n }, 'EFBIG'],
    ['with an L1 table too small for the disk', { l1Entries: 1 }, 'l1_size at byte 36 is 1, too small'],
    [
      'with an L1 table over 32 MiB',
      { l1Entries: 2 ** 22 + 1 },
      'l1_size at byte 36 is 4194305, must be at most 4194304',
    ],
    [
      'with an unaligned L1 table',
      { l1TableOffset: 0x30200n },
      'l1_table_offset at byte 40 is 197120, must be a multiple',
    ],
    ['with its L1 table in the header', { l1TableOffset: 0n }, 'l1_table_offset at byte 40 is 0'],
    ['with an L1 table past the end', { l1TableOffset: 0x40000n }, 'pass the end of the file'],
    ['with an L1 table at 2^60', { l1TableOffset: 1n << 60n }, 'must be below 2^53'],
    ['without a refcount table', { refcountTableClusters: 0 }, 'refcount_table_clusters at byte 56 is 0'],
    ['with a refcount table over 8 MiB', { refcountTableClusters: 129 }, 'refcount_table_clusters at byte 56 is 129'],
    ['with an unaligned refcount table', { refcountTableOffset: 0x10001n }, 'refcount_table_offset'],
    ['with 65,537 snapshots', { snapshotCount: 65537 }, 'nb_snapshots at byte 60 is 65537, must be at most 65536'],
    ['with an unaligned snapshot table', { snapshotCount: 1, snapshotsOffset: 8n }, 'snapshots_offset'],
    ['with a snapshot table past the end', { snapshotCount: 1, snapshotsOffset: 1n << 40n }, 'snapshots_offset'],
    ['with refcounts of 128 bits', { refcountOrder: 7 }, 'refcount_order at byte 96 is 7'],
    ['with a header length under 104', { headerLength: 96 }, 'header_length at byte 100 is 96'],
    ['with a header length over a cluster', { headerLength: CLUSTER + 8 }, 'header_length'],
    ['with a header length not in steps of 8', { headerLength: 108 }, 'header_length at byte 100 is 108'],
    ['with a compression type nobody knows', { compressionType: 2, incompatible: 8n }, 'ENOTSUP'],
    [
      'with zstd, but without its feature bit',
      { compressionType: 1 },
      'compression_type at byte 104 is 1, which contradicts',
    ],
    [
      'with the compression bit, but deflate',
      { incompatible: 8n },
      'compression_type at byte 104 is 0, which contradicts',
    ],
    ['with a backing name of 1024 bytes', { backingFileOffset: 0x200n, backingFileBytes: 1024 }, 'backing_file_size'],
    ['with a backing name over the cluster', { backingFileOffset: 0xfff8n, backingFileBytes: 9 }, 'backing_file_size'],
    ['with a backing name at 2^40', { backingFileOffset: 1n << 40n, backingFileBytes: 9 }, 'backing_file_offset'],
    [
      'with subclusters under 512 bytes',
      { clusterBits: 13, incompatible: 16n, refcountTableOffset: 0x2000n },
      'extended L2',
    ],
  ])('%s', (_rule, changes, expected) => {
    expect(failureOf(image(changes))).toContain(expected);
  });

  it('with an unknown incompatible feature, called by its name', () => {
    const names = encodeFeatureNames([{ kind: 'incompatible', bit: 5, name: 'sub-\nspace' }]);
    const storage = image(
      { incompatible: 0x60n },
      encodeExtensions([{ type: extensionType.FEATURE_NAMES, data: names }]),
    );
    expect(failureOf(storage)).toBe(
      'ENOTSUP disk.qcow2: the image uses incompatible features that this version does not know: "sub-\\nspace" (bit 5), bit 6',
    );
  });

  it('with an extension longer than the cluster', () => {
    const area = encodeExtensions([{ type: 0x1234, data: new Uint8Array(8) }]);
    new DataView(area.buffer).setUint32(4, 0xffff_fff0);
    expect(failureOf(image({}, area))).toContain('header extension 0x1234 at byte 112 claims 4294967280 bytes');
  });

  it.each([
    ['no bitmap', [0, 0, 0, 24, 0, 0x20000], 'nb_bitmaps is 0'],
    ['65,536 bitmaps', [65536, 0, 0, 24, 0, 0x20000], 'nb_bitmaps is 65536'],
    ['reserved bits', [1, 1, 0, 24, 0, 0x20000], 'reserved field is 0x1'],
    ['an empty directory', [1, 0, 0, 0, 0, 0x20000], 'bitmap_directory_size is 0'],
    ['a directory of 4 GiB', [1, 0, 1, 0, 0, 0x20000], 'bitmap_directory_size is 4294967296'],
    ['an unaligned directory', [1, 0, 0, 24, 0, 0x20008], 'bitmap_directory_offset is 0x20008'],
  ])('when its bitmaps extension has %s', (_rule, words, expected) => {
    const data = new Uint8Array(24);
    words.forEach((word, index) => void new DataView(data.buffer).setUint32(index * 4, word));
    const area = encodeExtensions([{ type: extensionType.BITMAPS, data }]);
    expect(failureOf(image({ autoclear: 1n }, area))).toContain(expected);
    expect(readHeader(image({ autoclear: 0n }, area)).bitmaps).toBeUndefined();
  });

  it('never by anything but an FsError, whatever the bytes are', () => {
    const start = image({}).bytes().slice(0, 256);
    fc.assert(
      fc.property(
        fc.array(fc.record({ at: fc.integer({ min: 4, max: 255 }), value: fc.integer({ min: 0, max: 255 }) }), {
          maxLength: 12,
        }),
        (changes) => {
          const bytes = start.slice();
          for (const { at, value } of changes) bytes[at] = value;
          try {
            decodeHeader(bytes, CLUSTER * FILE_CLUSTERS);
          } catch (error) {
            expect(error).toBeInstanceOf(FsError);
          }
        },
      ),
    );
  });
});

describe('a damaged image may still be opened', () => {
  it('with the corrupt bit', () => {
    expect(readHeader(image({ incompatible: 2n }))).toMatchObject({ corrupt: true, dirty: false });
  });

  it('with its last cluster written in part', () => {
    const storage = image({});
    storage.truncate(0x30010);
    expect(readHeader(storage).l1Entries).toBe(2);
  });

  it('without a usable refcount table, by whoever is about to rebuild it', () => {
    const storage = image({ refcountTableOffset: 1n << 40n, refcountTableClusters: 0 });
    expect(failureOf(storage)).toContain('refcount_table_clusters');
    expect(readHeader(storage, { refcountsUnusable: true }).l1Entries).toBe(2);
  });
});

describe('rewriting the first cluster', () => {
  const unknown = { type: 0x1234_5678, data: Uint8Array.of(1, 2, 3) };

  it('keeps unknown extensions and unknown header fields byte for byte', () => {
    const storage = image({ headerLength: 120 });
    storage.write(Uint8Array.of(9, 8, 7, 6, 5, 4, 3, 2), 0, 8, 112);
    const area = encodeExtensions([unknown]);
    storage.write(area, 0, area.length, 120);
    const cluster = encodeHeaderCluster(readHeader(storage), { backingFile: 'base.qcow2', backingFormat: 'qcow2' });
    expect(cluster.slice(112, 120)).toEqual(Uint8Array.of(9, 8, 7, 6, 5, 4, 3, 2));
    const again = decodeHeader(cluster, CLUSTER * FILE_CLUSTERS);
    expect(again.extensions[0]).toEqual(unknown);
    expect(again).toMatchObject({ backingFile: 'base.qcow2', backingFormat: 'qcow2', headerLength: 120 });
  });

  it('without changes gives an equal header', () => {
    const area = encodeExtensions([unknown, { type: extensionType.DATA_FILE, data: Buffer.from('data.raw') }]);
    const header = readHeader(image({ incompatible: 4n }, area));
    expect(decodeHeader(encodeHeaderCluster(header), CLUSTER * FILE_CLUSTERS)).toEqual(header);
  });

  it('removes what is set to undefined', () => {
    const cluster = encodeHeaderCluster(readHeader(image({})), { backingFile: 'base', backingFormat: 'raw' });
    const header = decodeHeader(cluster, CLUSTER * FILE_CLUSTERS);
    const bare = encodeHeaderCluster(header, { backingFile: undefined, backingFormat: undefined });
    expect(decodeHeader(bare, CLUSTER * FILE_CLUSTERS)).toMatchObject({ backingFile: undefined, extensions: [] });
  });

  it('keeps a backing name that is no UTF-8', () => {
    const name = Uint8Array.of(0x2f, 0xff, 0xfe);
    const header = decodeHeader(
      encodeHeaderCluster(readHeader(image({})), { backingFile: name }),
      CLUSTER * FILE_CLUSTERS,
    );
    expect(decodeHeader(encodeHeaderCluster(header, { size: 512 }), CLUSTER * FILE_CLUSTERS).backingFileRaw).toEqual(
      name,
    );
  });

  it.each([
    ['a name over 1023 bytes', { backingFile: 'x'.repeat(1024) }],
    ['more than fits in the cluster', { extensions: [{ type: 1, data: new Uint8Array(CLUSTER - 112) }] }],
  ])('refuses %s', (_rule, changes) => {
    expect(() => encodeHeaderCluster(readHeader(image({})), changes)).toThrow(FsError);
  });
});

describe('images made by qemu-img', () => {
  const create = (name: string, ...args: string[]): string => {
    const path = join(folder, name);
    execFileSync('qemu-img', [
      'create',
      '-q',
      '-f',
      'qcow2',
      ...args.map((arg) => arg.replace('@', folder)),
      path,
      '64M',
    ]);
    return path;
  };

  it.each<[string, string[], object]>([
    ['v2', ['-o', 'compat=0.10'], { version: 2, headerLength: 72 }],
    ['lazy', ['-o', 'lazy_refcounts=on'], { lazyRefcounts: true, compatible: 1n }],
    ['zstd', ['-o', 'compression_type=zstd'], { compressionType: 'zstd', incompatible: 8n }],
    ['extended', ['-o', 'extended_l2=on,cluster_size=2M'], { extendedL2: true, clusterBytes: 2 ** 21 }],
    ['refcounts', ['-o', 'refcount_bits=1,cluster_size=512'], { refcountBits: 1, clusterBytes: 512 }],
    [
      'data',
      ['-o', 'data_file=@/data.raw,data_file_raw=on'],
      { externalDataFile: true, dataFileRaw: true, dataFile: join(folder, 'data.raw') },
    ],
    ['overlay', ['-b', '@/v2', '-F', 'qcow2'], { backingFile: join(folder, 'v2'), backingFormat: 'qcow2' }],
    ['overlay-v2', ['-o', 'compat=0.10', '-b', '@/v2', '-F', 'qcow2'], { backingFile: join(folder, 'v2') }],
  ])('%s', (name, args, expected) => {
    expect(readHeader(MemoryStorage.load(create(name, ...args)))).toMatchObject({ size: 2 ** 26, ...expected });
  });

  it('are rewritten to the same bytes', () => {
    const bytes = MemoryStorage.load(create('same', '-b', '@/v2', '-F', 'qcow2')).bytes();
    const header = decodeHeader(bytes.subarray(0, CLUSTER), bytes.length);
    expect(Buffer.compare(encodeHeaderCluster(header), bytes.subarray(0, CLUSTER))).toBe(0);
  });

  it('with bitmaps', () => {
    const path = create('bitmaps');
    execFileSync('qemu-img', ['bitmap', '--add', path, 'changes']);
    expect(readHeader(MemoryStorage.load(path)).bitmaps).toMatchObject({ count: 1, directoryBytes: 32 });
  });
});
