/** Damaged and hostile images (DESIGN.md section 6): one clear sentence, no crash, no hang, no change of a file that cannot be opened. */
import { execFileSync, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Contents, Disk } from '../../src/disk/disk.ts';
import { openDisk } from '../../src/disk/open-disk.ts';
import { FsError } from '../../src/errors.ts';
import { createImage } from '../../src/qcow2/create.ts';
import { headerAt } from '../../src/qcow2/header.ts';
import { propertyRuns } from '../property-runs.ts';

const MIB = 2 ** 20;
const DISK_BYTES = 2 * MIB;

let folder = '';
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'vdskfs-hostile-'));
  for (const base of bases) base.make(join(folder, base.name));
});
afterAll(() => rmSync(folder, { recursive: true }));

interface Base {
  readonly name: string;
  readonly make: (path: string) => void;
}

function qemuImage(options: string): (path: string) => void {
  return (path) => {
    const run = (program: string, ...words: string[]): void => {
      execFileSync(program, words, { stdio: 'pipe' });
    };
    run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', options, path, String(DISK_BYTES));
    run('qemu-io', '-c', 'write -P 1 0 300k', '-c', 'write -z 300k 64k', '-c', 'write -P 2 1M 10k', path);
    run('qemu-io', '-c', 'write -c -P 3 512k 64k', '-c', 'write -c -P 4 576k 64k', path);
    run('qemu-img', 'snapshot', '-c', 'first', path);
    run('qemu-io', '-c', 'write -P 5 128k 100k', '-c', 'discard 1M 64k', path);
    run('qemu-img', 'snapshot', '-c', 'second', path);
    run('qemu-io', '-c', 'write -P 6 0 20k', path);
  };
}

const bases: readonly Base[] = [
  { name: 'v3.qcow2', make: qemuImage('cluster_size=4096') },
  { name: 'v2.qcow2', make: qemuImage('compat=0.10,cluster_size=65536') },
  {
    name: 'extended.qcow2',
    make: qemuImage('cluster_size=16384,extended_l2=on,compression_type=zstd,refcount_bits=64'),
  },
];

const hashOf = (path: string): string => createHash('sha1').update(readFileSync(path)).digest('hex');

/** Only what a caller must expect. */
function expected(error: unknown): asserts error is FsError {
  if (!(error instanceof FsError)) throw error;
  expect(error.message).toMatch(/^[^\n]+$/);
}

async function attempt<T>(action: () => T | Promise<T>): Promise<T | undefined> {
  try {
    return await action();
  } catch (error) {
    expected(error);
    return undefined;
  }
}

/** Read everything there is to read. */
async function readAll(contents: Contents): Promise<void> {
  const size = Math.min(contents.size(), 3 * MIB);
  const buffer = new Uint8Array(64 * 1024);
  for (let at = 0; at < size; at += buffer.length) {
    await attempt(() => contents.read(buffer, 0, Math.min(buffer.length, size - at), at));
  }
  await attempt(() => {
    let steps = 0;
    for (let at = 0; at >= 0 && at < size && steps < 2000; steps++) {
      const data = contents.nextData(at);
      if (data < 0) break;
      expect(data).toBeGreaterThanOrEqual(at);
      at = contents.nextHole(data);
      expect(at).toBeGreaterThan(data);
    }
  });
}

async function useDisk(disk: Disk, writing: boolean): Promise<void> {
  await attempt(() => disk.info());
  const live = disk.openLive().contents;
  await readAll(live);
  for (const checkpoint of disk.checkpoints().slice(0, 5)) {
    await attempt(() => disk.allocatedBytes(checkpoint));
    const open = await attempt(() => disk.openCheckpoint(checkpoint));
    if (open !== undefined) await readAll(open.contents);
    open?.[Symbol.dispose]();
    for (const { name } of checkpoint.stateFiles) {
      const state = await attempt(() => disk.openState(checkpoint, name));
      if (state !== undefined) await readAll(state.contents);
      state?.[Symbol.dispose]();
    }
    await attempt(() => disk.details(checkpoint));
  }
  if (!writing) return;
  const bytes = new Uint8Array(30_000).fill(9);
  const at = (offset: number): number => Math.max(0, Math.min(offset, live.size() - bytes.length));
  const length = Math.min(bytes.length, live.size());
  await attempt(() => live.write(bytes, 0, length, at(1000)));
  await attempt(() => live.write(bytes, 0, length, at(520_000)));
  await attempt(() => live.flush());
  await attempt(() => disk.takeCheckpoint('new'));
  await attempt(() => live.discard(at(100_000), length));
  await attempt(() => live.writeZeroes(at(200_000), length));
  await attempt(() => live.write(bytes, 0, length, at(1_900_000)));
  const [first] = disk.checkpoints();
  if (first !== undefined) {
    await attempt(() => disk.rollback(first));
    await attempt(() => disk.deleteCheckpoint(first));
  }
  await attempt(() => disk.resize(4 * MIB, { shrink: false }));
  await attempt(() => live.flush());
}

/** Open and use a file in every way. @returns the sentences of the opens that failed */
async function explore(path: string): Promise<string[]> {
  const sentences: string[] = [];
  for (const readOnly of [true, false]) {
    const before = hashOf(path);
    let disk: Disk;
    try {
      disk = await openDisk(path, { readOnly, cacheBytes: 0 });
    } catch (error) {
      expected(error);
      sentences.push(error.message);
      expect(hashOf(path)).toBe(before);
      continue;
    }
    await useDisk(disk, !readOnly);
    await attempt(() => disk.close());
    if (readOnly) expect(hashOf(path)).toBe(before);
  }
  return sentences;
}

/** Where the tables of an image are. */
function tablesOf(image: DataView) {
  const u64 = (at: number): number => Number(image.getBigUint64(at) & 0x00ff_ffff_ffff_fe00n);
  const l1 = u64(headerAt.l1TableOffset);
  const refcountTable = u64(headerAt.refcountTableOffset);
  const snapshots = Number(image.getBigUint64(headerAt.snapshotsOffset));
  return {
    l1,
    l2: u64(l1),
    refcountTable,
    refcountBlock: u64(refcountTable),
    snapshots,
    snapshotL1: u64(snapshots),
    clusterBytes: 2 ** image.getUint32(headerAt.clusterBits),
  };
}

type Damage = (image: DataView, at: ReturnType<typeof tablesOf>) => void;

const u32 =
  (field: keyof typeof headerAt, value: number): Damage =>
  (image) =>
    image.setUint32(headerAt[field], value);
const u64 =
  (field: keyof typeof headerAt, value: bigint): Damage =>
  (image) =>
    image.setBigUint64(headerAt[field], value);
/** Overwrite the 8 bytes of an entry. */
const entry =
  (table: 'l1' | 'l2' | 'refcountTable' | 'snapshots' | 'snapshotL1', index: number, value: bigint): Damage =>
  (image, at) =>
    image.setBigUint64(at[table] + index * 8, value);

const COPIED = 1n << 63n;
const COMPRESSED = 1n << 62n;

const damages: readonly [string, Damage][] = [
  ['magic', u32('magic', 0)],
  ['version 0', u32('version', 0)],
  ['version 4', u32('version', 4)],
  ['backing name far away', u64('backingFileOffset', 1n << 60n)],
  [
    'backing name in the header',
    (image) => {
      image.setBigUint64(headerAt.backingFileOffset, 8n);
      image.setUint32(headerAt.backingFileBytes, 8);
    },
  ],
  [
    'backing name of 4 GiB',
    (image) => {
      image.setBigUint64(headerAt.backingFileOffset, 200n);
      image.setUint32(headerAt.backingFileBytes, 0xffff_ffff);
    },
  ],
  ['clusters of 256 bytes', u32('clusterBits', 8)],
  ['clusters of 4 MiB', u32('clusterBits', 22)],
  ['clusters of 2^33 bytes', u32('clusterBits', 33)],
  ['larger clusters than it has', u32('clusterBits', 21)],
  ['smaller clusters than it has', u32('clusterBits', 9)],
  ['size 2^63', u64('size', 1n << 63n)],
  ['size 2^53', u64('size', 1n << 53n)],
  ['size 1 EiB - 1', u64('size', (1n << 60n) - 1n)],
  ['size not a multiple of 512', u64('size', 2_097_001n)],
  ['size 0', u64('size', 0n)],
  ['encryption', u32('cryptMethod', 2)],
  ['no L1 entries', u32('l1Entries', 0)],
  ['4 G L1 entries', u32('l1Entries', 0xffff_ffff)],
  ['L1 table in the header', u64('l1TableOffset', 0n)],
  ['L1 table past the end', u64('l1TableOffset', 1n << 40n)],
  ['L1 table past 2^53', u64('l1TableOffset', 1n << 55n)],
  ['L1 table misaligned', (image, at) => image.setBigUint64(headerAt.l1TableOffset, BigInt(at.l1 + 8))],
  [
    'L1 table where the refcount table is',
    (image, at) => image.setBigUint64(headerAt.l1TableOffset, BigInt(at.refcountTable)),
  ],
  ['refcount table in the header', u64('refcountTableOffset', 0n)],
  ['refcount table past the end', u64('refcountTableOffset', 1n << 41n)],
  ['refcount table of 2^44 bytes', u32('refcountTableClusters', 0xffff_ffff)],
  ['refcount table of no clusters', u32('refcountTableClusters', 0)],
  ['4 G snapshots', u32('snapshotCount', 0xffff_ffff)],
  ['65536 snapshots', u32('snapshotCount', 65_536)],
  ['one snapshot too many', u32('snapshotCount', 3)],
  ['snapshot table past the end', u64('snapshotsOffset', 1n << 42n)],
  ['snapshot table in the header', u64('snapshotsOffset', 0n)],
  ['snapshot table misaligned', (image, at) => image.setBigUint64(headerAt.snapshotsOffset, BigInt(at.snapshots + 8))],
  ['snapshot table where the L1 table is', (image, at) => image.setBigUint64(headerAt.snapshotsOffset, BigInt(at.l1))],
  ['all incompatible features', u64('incompatible', 0xffff_ffff_ffff_ffffn)],
  ['dirty', u64('incompatible', 1n)],
  ['corrupt', u64('incompatible', 2n)],
  ['an external data file that is not named', u64('incompatible', 4n)],
  ['extended L2 entries that are not', u64('incompatible', 16n)],
  ['all autoclear features', u64('autoclear', 0xffff_ffff_ffff_ffffn)],
  ['refcounts of 2^7 bits', u32('refcountOrder', 7)],
  ['refcounts of 1 bit', u32('refcountOrder', 0)],
  ['header length 2^31', u32('headerLength', 2 ** 31)],
  ['header length 8', u32('headerLength', 8)],
  ['a header extension of 4 GiB', (image) => image.setUint32(image.getUint32(headerAt.headerLength) + 4, 0xffff_ffff)],

  ['L1 entry past the end', entry('l1', 0, COPIED | (1n << 45n))],
  ['L1 entry past 2^53', entry('l1', 0, COPIED | (1n << 55n))],
  ['L1 entry misaligned', entry('l1', 0, COPIED | 0x200n)],
  ['L1 entry with reserved bits', entry('l1', 0, 0x7fff_ffff_ffff_ffffn)],
  ['L1 entry to the header', (image, at) => image.setBigUint64(at.l1, COPIED | 0x1_0000_0000n)],
  ['L1 entry to the refcount table', (image, at) => image.setBigUint64(at.l1, COPIED | BigInt(at.refcountTable))],
  ['L1 entry to the L1 table', (image, at) => image.setBigUint64(at.l1, COPIED | BigInt(at.l1))],
  ['L2 entry past the end', entry('l2', 0, COPIED | (1n << 45n))],
  ['L2 entry past 2^53', entry('l2', 0, COPIED | (1n << 54n))],
  ['L2 entry misaligned', entry('l2', 0, COPIED | 0x5200n)],
  ['L2 entry with reserved bits', entry('l2', 0, COPIED | 0x3f00_0000_0000_01fen)],
  ['L2 entry to the L1 table', (image, at) => image.setBigUint64(at.l2, COPIED | BigInt(at.l1))],
  ['L2 entry to its own table', (image, at) => image.setBigUint64(at.l2, COPIED | BigInt(at.l2))],
  ['L2 entry to the refcount block', (image, at) => image.setBigUint64(at.l2, COPIED | BigInt(at.refcountBlock))],
  ['L2 entry to the snapshot table', (image, at) => image.setBigUint64(at.l2, COPIED | BigInt(at.snapshots))],
  ['L2 entry to a snapshot L1 table', (image, at) => image.setBigUint64(at.l2, COPIED | BigInt(at.snapshotL1))],
  ['compressed garbage', (image, at) => image.setBigUint64(at.l2, COMPRESSED | BigInt(at.l1))],
  ['compressed data past the end', entry('l2', 0, COMPRESSED | (1n << 40n))],
  ['compressed data of all sectors', entry('l2', 0, 0x7fff_ffff_0000_0000n)],
  [
    'all L2 entries the same',
    (image, at) => {
      for (let offset = 0; offset < at.clusterBytes; offset += 8) {
        image.setBigUint64(at.l2 + offset, COPIED | BigInt(at.clusterBytes * 5));
      }
    },
  ],
  [
    'all L2 entries ones',
    (image, at) => {
      for (let offset = 0; offset < at.clusterBytes; offset++) image.setUint8(at.l2 + offset, 0xff);
    },
  ],
  ['refcount block past the end', entry('refcountTable', 0, 1n << 45n)],
  ['refcount block past 2^53', entry('refcountTable', 0, 1n << 60n)],
  ['refcount block misaligned', entry('refcountTable', 0, 0x200n)],
  ['refcount block with reserved bits', entry('refcountTable', 0, 0x1ffn)],
  ['no refcount block', entry('refcountTable', 0, 0n)],
  [
    'two refcount blocks in one place',
    (image, at) => image.setBigUint64(at.refcountTable + 8, BigInt(at.refcountBlock)),
  ],
  [
    'all refcounts 0',
    (image, at) => {
      for (let offset = 0; offset < at.clusterBytes; offset++) image.setUint8(at.refcountBlock + offset, 0);
    },
  ],
  [
    'all refcounts as large as can be',
    (image, at) => {
      for (let offset = 0; offset < at.clusterBytes; offset++) image.setUint8(at.refcountBlock + offset, 0xff);
    },
  ],
  ['snapshot L1 table past the end', entry('snapshots', 0, 1n << 45n)],
  ['snapshot L1 table past 2^53', entry('snapshots', 0, 1n << 60n)],
  ['snapshot L1 table misaligned', entry('snapshots', 0, 8n)],
  ['snapshot L1 table of 4 G entries', (image, at) => image.setUint32(at.snapshots + 8, 0xffff_ffff)],
  ['snapshot L1 table is the active one', (image, at) => image.setBigUint64(at.snapshots, BigInt(at.l1))],
  ['snapshot ID of 64 KiB', (image, at) => image.setUint16(at.snapshots + 12, 0xffff)],
  ['snapshot name of 64 KiB', (image, at) => image.setUint16(at.snapshots + 14, 0xffff)],
  ['snapshot extra data of 4 GiB', (image, at) => image.setUint32(at.snapshots + 36, 0xffff_ffff)],
  ['snapshot VM state of 2^63 bytes', (image, at) => image.setBigUint64(at.snapshots + 40, 1n << 63n)],
  ['snapshot VM state of 2^52 bytes', (image, at) => image.setBigUint64(at.snapshots + 40, 1n << 52n)],
  ['snapshot of a disk of 2^63 bytes', (image, at) => image.setBigUint64(at.snapshots + 48, 1n << 63n)],
  ['snapshot of a disk of 2^52 bytes', (image, at) => image.setBigUint64(at.snapshots + 48, 1n << 52n)],
  ['snapshot of an empty disk', (image, at) => image.setBigUint64(at.snapshots + 48, 0n)],
  ['snapshot L1 entry past the end', entry('snapshotL1', 0, 1n << 45n)],
  ['snapshot L1 entry past 2^53', entry('snapshotL1', 0, 1n << 55n)],
  ['snapshot L1 entry misaligned', entry('snapshotL1', 0, 0x200n)],
  ['snapshot L1 entry to its own table', (image, at) => image.setBigUint64(at.snapshotL1, BigInt(at.snapshotL1))],
];

describe.each(bases)('an image that is damaged: $name', ({ name }) => {
  it.each(damages)('%s', async (_what, damage) => {
    const path = join(folder, 'damaged.qcow2');
    const bytes = readFileSync(join(folder, name));
    const image = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    damage(image, tablesOf(image));
    writeFileSync(path, bytes);
    await explore(path);
  });

  it('cut off anywhere', async () => {
    const path = join(folder, 'cut.qcow2');
    const bytes = readFileSync(join(folder, name));
    const { l1, l2, refcountTable, refcountBlock, snapshots, snapshotL1 } = tablesOf(
      new DataView(bytes.buffer, bytes.byteOffset),
    );
    const places = [l1, l2, refcountTable, refcountBlock, snapshots, snapshotL1].flatMap((at) => [
      at,
      at + 4,
      at + 600,
    ]);
    for (const size of [0, 1, 4, 71, 72, 103, 104, 111, 112, 500, ...places, bytes.length - 1]) {
      writeFileSync(path, bytes.subarray(0, size));
      await explore(path);
    }
  });

  it('bytes changed at random in its tables', async () => {
    const path = join(folder, 'random.qcow2');
    const whole = readFileSync(join(folder, name));
    const tables = tablesOf(new DataView(whole.buffer, whole.byteOffset));
    const places = [
      0,
      tables.l1,
      tables.l2,
      tables.refcountTable,
      tables.refcountBlock,
      tables.snapshots,
      tables.snapshotL1,
    ];
    const change = fc.record({
      place: fc.constantFrom(...places),
      // Entries are at the start of their tables.
      at: fc.oneof(fc.integer({ min: 0, max: 128 }), fc.integer({ min: 0, max: 1000 })),
      value: fc.integer({ min: 0, max: 255 }),
    });
    await fc.assert(
      fc.asyncProperty(fc.array(change, { minLength: 1, maxLength: 4 }), async (changes) => {
        const bytes = Buffer.from(whole);
        for (const { place, at, value } of changes) if (place + at < bytes.length) bytes[place + at] = value;
        writeFileSync(path, bytes);
        await explore(path);
      }),
      { numRuns: propertyRuns(100), endOnFailure: true },
    );
  });
});

describe('a chain that does not end', () => {
  const overlay = (path: string, backing: string): void => {
    execFileSync('qemu-img', ['create', '-q', '-u', '-f', 'qcow2', '-b', backing, '-F', 'qcow2', path, '1M']);
  };

  it.each([
    ['an image over itself', ['a'], ['a.qcow2']],
    ['two images over each other', ['a', 'b'], ['b.qcow2', 'a.qcow2']],
    ['three in a ring', ['a', 'b', 'c'], ['b.qcow2', 'c.qcow2', 'a.qcow2']],
    ['a ring by way of a folder', ['a'], ['sub/../a.qcow2']],
  ])('%s is a loop', async (what, names, backings) => {
    const place = join(folder, what.replaceAll(' ', '-'));
    mkdirSync(join(place, 'sub'), { recursive: true });
    for (const [index, name] of names.entries()) overlay(join(place, `${name}.qcow2`), backings[index] as string);
    const sentences = await explore(join(place, 'a.qcow2'));
    expect(sentences).toHaveLength(2);
    for (const sentence of sentences) expect(sentence).toMatch(/loop|in use/);
  });

  it('links that lead round and round end at the greatest depth', async () => {
    const place = join(folder, 'links');
    mkdirSync(place);
    symlinkSync('.', join(place, 'here'));
    overlay(join(place, 'a.qcow2'), 'here/a.qcow2');
    expect(await explore(join(place, 'a.qcow2'))).toHaveLength(2);
  });

  it('a deep chain is read, one that is too deep is not', async () => {
    const place = join(folder, 'deep');
    mkdirSync(place);
    writeFileSync(join(place, '0'), new Uint8Array(MIB).fill(7));
    createImage(join(place, '1'), { size: MIB, clusterBytes: 4096, backing: { file: '0', format: 'raw' } });
    for (let depth = 2; depth <= 210; depth++) {
      const options = { size: MIB, clusterBytes: 4096, backing: { file: String(depth - 1), format: 'qcow2' } } as const;
      createImage(join(place, String(depth)), options);
    }
    const disk = await openDisk(join(place, '150'), { readOnly: true, cacheBytes: 0 });
    const bytes = new Uint8Array(100);
    disk.openLive().contents.read(bytes, 0, bytes.length, 500_000);
    expect(bytes).toEqual(new Uint8Array(100).fill(7));
    await disk.close();
    await expect(openDisk(join(place, '210'), { readOnly: true })).rejects.toThrow(/deeper than 200/);
  });

  it.each([
    ['a folder', '.'],
    ['missing', 'nowhere.qcow2'],
    ['a device that gives no end of bytes', '/dev/zero'],
    ['of another protocol', 'nbd://localhost/x'],
    ['a file of another format', 'json:{"driver":"raw"}'],
  ])('a backing file that is %s', async (_what, backing) => {
    const path = join(folder, 'strange-backing.qcow2');
    rmSync(path, { force: true });
    overlay(path, backing);
    expect(await explore(path)).toHaveLength(2);
  });
});

describe('numbers that claim much', () => {
  /** A file of 8 TiB of holes behind what is there: every offset is in the file. */
  async function exploreSparse(name: string, damage: Damage): Promise<void> {
    const path = join(folder, 'sparse.qcow2');
    const bytes = readFileSync(join(folder, name));
    const image = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    damage(image, tablesOf(image));
    writeFileSync(path, bytes);
    truncateSync(path, 8 * 2 ** 40);
    try {
      for (const readOnly of [true, false]) {
        const disk = await attempt(() => openDisk(path, { readOnly, cacheBytes: 0 }));
        if (disk === undefined) continue;
        await useDisk(disk, !readOnly);
        await attempt(() => disk.close());
      }
    } finally {
      rmSync(path);
    }
  }

  it.each<[string, Damage]>([
    ['nothing but the size of the file', () => {}],
    [
      'an L1 table of 32 MiB',
      (image) => {
        image.setUint32(headerAt.l1Entries, 4_194_304);
        image.setBigUint64(headerAt.l1TableOffset, 1n << 40n);
      },
    ],
    [
      'a disk of 2^52 bytes with it',
      (image) => {
        image.setUint32(headerAt.l1Entries, 4_194_304);
        image.setBigUint64(headerAt.l1TableOffset, 1n << 40n);
        image.setBigUint64(headerAt.size, 4_194_304n * BigInt((2 ** image.getUint32(headerAt.clusterBits)) ** 2 / 16));
      },
    ],
    [
      'a refcount table of 8 MiB',
      (image, { clusterBytes }) => {
        image.setUint32(headerAt.refcountTableClusters, (8 * MIB) / clusterBytes);
        image.setBigUint64(headerAt.refcountTableOffset, 1n << 40n);
      },
    ],
    [
      '65536 snapshots',
      (image) => {
        image.setUint32(headerAt.snapshotCount, 65_536);
        image.setBigUint64(headerAt.snapshotsOffset, 1n << 40n);
      },
    ],
    ['a snapshot of 4 Mi L1 entries', (image, at) => image.setUint32(at.snapshots + 8, 4_194_304)],
    [
      'a snapshot of 4 Mi L1 entries, far away',
      (image, at) => {
        image.setUint32(at.snapshots + 8, 4_194_304);
        image.setBigUint64(at.snapshots, 1n << 41n);
      },
    ],
    ['an L2 table in a hole', entry('l1', 0, COPIED | (1n << 40n))],
    ['a cluster in a hole', entry('l2', 0, COPIED | (1n << 40n))],
    ['a refcount block in a hole', entry('refcountTable', 0, 1n << 40n)],
    ['a refcount block for the end of the file', entry('refcountTable', 300, 1n << 40n)],
    ['dirty', u64('incompatible', 1n)],
  ])('%s: memory follows what is read', async (_what, damage) => {
    const before = process.memoryUsage.rss();
    await exploreSparse('v3.qcow2', damage);
    expect(process.memoryUsage.rss() - before).toBeLessThan(300 * MIB);
  });
});

describe('the command line', () => {
  const vdskfs = fileURLToPath(new URL('../../bin/vdskfs', import.meta.url));

  it.each<[string, Damage]>([
    ['no magic', u32('magic', 0)],
    ['clusters of 2^33 bytes', u32('clusterBits', 33)],
    ['L1 table past the end', u64('l1TableOffset', 1n << 40n)],
    ['unknown features', u64('incompatible', 0xffff_ffff_ffff_ff00n)],
    ['4 G snapshots', u32('snapshotCount', 0xffff_ffff)],
  ])('info of an image with %s: status 1, one line', (_what, damage) => {
    const path = join(folder, 'for-info.qcow2');
    const bytes = readFileSync(join(folder, 'v3.qcow2'));
    const image = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    damage(image, tablesOf(image));
    writeFileSync(path, bytes);
    const { status, stdout, stderr } = spawnSync(vdskfs, ['info', path], { encoding: 'utf8' });
    expect({ status, stdout }).toEqual({ status: 1, stdout: '' });
    expect(stderr).toMatch(/^[^\n]*for-info\.qcow2[^\n]*\n$/);
    expect(Buffer.compare(readFileSync(path), bytes)).toBe(0);
  });
});
