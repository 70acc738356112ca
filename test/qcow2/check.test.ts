import { execFileSync, spawnSync } from 'node:child_process';
import { copyFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { CorruptImage } from '../../src/errors.ts';
import { type CheckOptions, type CheckReport, checkImage, rebuildRefcounts } from '../../src/qcow2/check.ts';
import { formatImage } from '../../src/qcow2/create.ts';
import { type Header, headerAt, readHeader } from '../../src/qcow2/header.ts';
import { encodeSnapshotTable, readSnapshotTable } from '../../src/qcow2/snapshot-table.ts';
import { MemoryStorage } from './memory-storage.ts';

const folder = mkdtempSync(join(tmpdir(), 'vdskfs-check-'));
afterAll(() => rmSync(folder, { recursive: true }));

const check = (storage: MemoryStorage, options: CheckOptions = {}): Promise<CheckReport> =>
  checkImage(storage, readHeader(storage, { refcountsUnusable: true }), options);

const qemuImg = (...args: string[]): string => execFileSync('qemu-img', args, { encoding: 'utf8', stdio: 'pipe' });

interface QemuReport {
  corruptions?: number;
  leaks?: number;
  'total-clusters': number;
  'allocated-clusters'?: number;
  'compressed-clusters'?: number;
  'image-end-offset': number;
}

/** qemu-img's count of the same image. */
function qemuCheck(path: string): QemuReport {
  const done = spawnSync('qemu-img', ['check', '-f', 'qcow2', '--output=json', path], { encoding: 'utf8' });
  return JSON.parse(done.stdout) as QemuReport;
}

/** The fields that both reports have. */
const common = (report: CheckReport) => ({
  corruptions: report.corruptions,
  leaks: report.leaks,
  total: report.totalClusters,
  allocated: report.allocatedClusters,
  compressed: report.compressedClusters,
  end: report.imageEndOffset,
});
const commonOfQemu = (report: QemuReport): ReturnType<typeof common> => ({
  corruptions: report.corruptions ?? 0,
  leaks: report.leaks ?? 0,
  total: report['total-clusters'],
  allocated: report['allocated-clusters'] ?? 0,
  compressed: report['compressed-clusters'] ?? 0,
  end: report['image-end-offset'],
});

function saved(storage: MemoryStorage): string {
  const path = join(folder, 'now.qcow2');
  writeFileSync(path, storage.bytes());
  return path;
}

const expectAgreement = async (storage: MemoryStorage): Promise<CheckReport> => {
  const report = await check(storage);
  expect(common(report)).toEqual(commonOfQemu(qemuCheck(saved(storage))));
  return report;
};

/** qemu-img finds nothing wrong, and the disk and its snapshots read as in the sound image. */
function expectSound(storage: MemoryStorage, original: string): void {
  const path = saved(storage);
  expect(qemuCheck(path)).toMatchObject({ 'check-errors': 0 });
  expect(commonOfQemu(qemuCheck(path))).toMatchObject({ corruptions: 0, leaks: 0 });
  expect(qemuImg('compare', original, path)).toContain('identical');
  for (const name of ['one', 'two']) {
    const of = (image: string): string => {
      const raw = join(folder, 'snapshot.raw');
      qemuImg('convert', '-f', 'qcow2', '-l', name, '-O', 'raw', image, raw);
      return readFileSync(raw).toString('latin1');
    };
    expect(of(path) === of(original), `snapshot ${name}`).toBe(true);
  }
}

const variants: Record<string, readonly string[]> = {
  'v3, clusters of 4 KiB': ['cluster_size=4k'],
  v2: ['compat=0.10,cluster_size=4k'],
  'clusters of 512 bytes, refcounts of 8 bits': ['cluster_size=512,refcount_bits=8'],
  'extended L2 entries': ['cluster_size=16k,extended_l2=on'],
  'refcounts of 64 bits': ['cluster_size=4k,refcount_bits=64'],
  'refcounts of 1 bit': ['cluster_size=4k,refcount_bits=1'],
  'an external data file': [`cluster_size=4k,data_file=${join(folder, 'data.raw')}`],
  zstd: ['compression_type=zstd'],
};

/** Data, zero clusters, holes, compressed clusters, two snapshots and a bitmap, as far as the variant can. */
function makeImage(name: string, options: readonly string[]): string {
  const path = join(folder, `${name.replaceAll(/\W/g, '-')}.qcow2`);
  const all = options.join(',');
  qemuImg('create', '-q', '-f', 'qcow2', '-o', all, path, '8M');
  const io = (...commands: string[]): unknown =>
    execFileSync('qemu-io', [...commands.flatMap((command) => ['-c', command]), path]);
  io('write -P 1 0 1M', 'write -P 2 3M 100k', 'write -z 2M 64k', 'write -z 64k 32k', 'discard 512k 64k');
  const external = all.includes('data_file');
  if (!external) io('write -c -P 3 5M 64k');
  if (!external && !all.includes('refcount_bits=1')) {
    qemuImg('snapshot', '-c', 'one', path);
    io('write -P 5 100k 300k');
    qemuImg('snapshot', '-c', 'two', path);
    io('write -P 6 4M 300k');
  }
  if (!all.includes('compat=0.10')) {
    qemuImg('bitmap', '--add', '-g', '512', path, 'changes');
    io('write -P 7 6M 40k');
  }
  return path;
}

describe('a sound image has nothing wrong, and the numbers of qemu-img check', () => {
  it.each(Object.entries(variants))('%s', async (name, options) => {
    const storage = MemoryStorage.load(makeImage(name, options));
    const report = await expectAgreement(storage);
    expect(report).toMatchObject({ corruptions: 0, leaks: 0, messages: [] });
    expect(storage.log).toEqual([]);
  });

  it.each(['leaks', 'all'] as const)('and repair %s writes nothing to it', async (repair) => {
    const storage = MemoryStorage.load(makeImage('untouched', ['cluster_size=4k']));
    await check(storage, { repair });
    expect(storage.log).toEqual([]);
  });
});

/** Where things are in the image that the cases below damage. */
interface Places {
  readonly header: Header;
  readonly storage: MemoryStorage;
  readonly number: (position: number) => bigint;
  readonly put: (position: number, value: bigint) => void;
  /** Positions of an L1 entry, of its L2 table and of an entry there, none of which a snapshot shares. */
  readonly l1Entry: number;
  readonly l2: number;
  readonly dataEntry: number;
  /** Position of the refcount (16 bits) of the cluster at that host offset. */
  readonly refcount: (offset: number) => number;
}

const COPIED = 1n << 63n;
const OFFSET = 0x00ff_ffff_ffff_fe00n;

function placesIn(storage: MemoryStorage): Places {
  const header = readHeader(storage);
  const word = new Uint8Array(8);
  const view = new DataView(word.buffer);
  const number = (position: number): bigint => {
    storage.read(word, 0, 8, position);
    return view.getBigUint64(0);
  };
  const put = (position: number, value: bigint): void => {
    view.setBigUint64(0, value);
    storage.write(word, 0, 8, position);
  };
  let l1Entry = header.l1TableOffset;
  let dataEntry = 0;
  for (; dataEntry === 0; l1Entry += dataEntry === 0 ? 8 : 0) {
    if (l1Entry >= header.l1TableOffset + header.l1Entries * 8) throw new Error('the image has no cluster of its own');
    const table = Number(number(l1Entry) & OFFSET);
    if (table === 0 || (number(l1Entry) & COPIED) === 0n) continue;
    for (let entry = table; entry < table + header.clusterBytes && dataEntry === 0; entry += 8) {
      if ((number(entry) & (COPIED | 1n)) === COPIED) dataEntry = entry;
    }
  }
  const l2 = Number(number(l1Entry) & OFFSET);
  const refcount = (offset: number): number => {
    const cluster = offset / header.clusterBytes;
    const perBlock = header.clusterBytes / 2;
    return Number(number(header.refcountTableOffset + Math.floor(cluster / perBlock) * 8)) + (cluster % perBlock) * 2;
  };
  return { header, storage, number, put, l1Entry, l2, dataEntry, refcount };
}

const put16 = (storage: MemoryStorage, position: number, value: number): void =>
  storage.write(Uint8Array.of(value >>> 8, value), 0, 2, position);

describe('damage that counting mends', () => {
  let original = '';
  beforeAll(() => {
    original = makeImage('damaged', ['cluster_size=4k']);
  });

  it.each<[string, (places: Places) => void, { corruptions?: number; leaks?: number }]>([
    [
      'a leaked cluster',
      ({ storage, refcount, header }) =>
        put16(storage, refcount(Math.ceil(storage.size() / 4096 - 1) * header.clusterBytes), 9),
      { leaks: 1 },
    ],
    [
      'a refcount that is too low',
      ({ storage, refcount, number, dataEntry }) => put16(storage, refcount(Number(number(dataEntry) & OFFSET)), 0),
      {},
    ],
    [
      'a refcount that is too high, so that its COPIED flag is wrong',
      ({ storage, refcount, number, dataEntry }) => put16(storage, refcount(Number(number(dataEntry) & OFFSET)), 7),
      { corruptions: 1, leaks: 1 },
    ],
    [
      'COPIED missing in an L2 entry',
      ({ number, put, dataEntry }) => put(dataEntry, number(dataEntry) & ~COPIED),
      { corruptions: 1 },
    ],
    [
      'COPIED on a shared cluster',
      ({ number, put, header }) => {
        let entry = Number(number(header.l1TableOffset) & OFFSET);
        while (number(entry) === 0n || (number(entry) & (COPIED | 1n | (1n << 62n))) !== 0n) entry += 8;
        put(entry, number(entry) | COPIED);
      },
      { corruptions: 1 },
    ],
    [
      'COPIED missing in an L1 entry',
      ({ number, put, l1Entry }) => put(l1Entry, number(l1Entry) & ~COPIED),
      { corruptions: 1 },
    ],
    ['a missing refcount block', ({ put, header }) => put(header.refcountTableOffset, 0n), {}],
    [
      'an unaligned refcount block',
      ({ number, put, header }) => put(header.refcountTableOffset, number(header.refcountTableOffset) + 512n),
      {},
    ],
    [
      'a refcount block behind the end',
      ({ put, header }) => put(header.refcountTableOffset + 24, 1n << 40n),
      { corruptions: 1 },
    ],
    [
      'a refcount block where an L2 table is',
      ({ put, header, l2 }) => put(header.refcountTableOffset + 24, BigInt(l2)),
      {},
    ],
    [
      'reserved bits in the refcount table',
      ({ number, put, header }) => put(header.refcountTableOffset, number(header.refcountTableOffset) | 4n),
      {},
    ],
    ['a refcount table behind the end', ({ put }) => put(headerAt.refcountTableOffset, 1n << 40n), {}],
    ['an unaligned refcount table', ({ put }) => put(headerAt.refcountTableOffset, 0x1200n), {}],
    ['all refcounts zero', ({ storage, refcount }) => storage.write(new Uint8Array(4096), 0, 4096, refcount(0)), {}],
  ])('%s', async (_rule, damage, expected) => {
    const storage = MemoryStorage.load(original);
    damage(placesIn(storage));
    const before = await check(storage);
    expect(before).toMatchObject(expected);
    expect(before.corruptions + before.leaks).toBeGreaterThan(0);

    const report = await check(storage, { repair: 'all' });
    expect(report).toMatchObject({
      corruptions: 0,
      leaks: 0,
      corruptionsFixed: before.corruptions,
      leaksFixed: before.leaks,
    });
    expectSound(storage, original);
  });

  it('repair leaks lowers refcounts, and the flags that follow, and nothing else', async () => {
    const storage = MemoryStorage.load(original);
    const { refcount, number, dataEntry, l2 } = placesIn(storage);
    put16(storage, refcount(Number(number(dataEntry) & OFFSET)), 2);
    expect(await check(storage, { repair: 'leaks' })).toMatchObject({ corruptions: 0, leaks: 0, leaksFixed: 1 });
    expectSound(storage, original);

    put16(storage, refcount(l2), 0);
    expect(await check(storage, { repair: 'leaks' })).toMatchObject({ leaks: 0, corruptionsFixed: 0 });
    expect((await check(storage)).corruptions).toBeGreaterThan(0);
  });

  it('repair leaks goes round what it must not touch', async () => {
    const storage = MemoryStorage.load(original);
    const { put, header, refcount, number, dataEntry, l2 } = placesIn(storage);
    put16(storage, refcount(Number(number(dataEntry) & OFFSET)), 2);
    put(header.refcountTableOffset + 24, BigInt(l2));
    const before = storage.bytes();
    await check(storage, { repair: 'leaks' });
    expect(Buffer.compare(storage.bytes(), before)).toBe(0);
  });

  it('the dirty and corrupt bits go when nothing is wrong any more', async () => {
    const storage = MemoryStorage.load(original);
    const { put } = placesIn(storage);
    put(headerAt.incompatible, 3n);
    await check(storage, { repair: 'all' });
    expect(readHeader(storage)).toMatchObject({ dirty: false, corrupt: false });
  });

  it('whichever write of the repair is the last before the power fails, it can be begun again', async () => {
    for (const damage of [
      ({ put, header }: Places) => put(header.refcountTableOffset, 512n),
      ({ storage, refcount }: Places) => storage.write(new Uint8Array(600).fill(3), 0, 600, refcount(0)),
    ]) {
      const damaged = MemoryStorage.load(original);
      damage(placesIn(damaged));
      const writing = new MemoryStorage('writing.qcow2', damaged.bytes());
      await check(writing, { repair: 'all' });
      for (let last = 0; last <= writing.log.length; last++) {
        const crashed = new MemoryStorage('crashed.qcow2', damaged.bytes());
        for (const event of writing.log.slice(0, last)) {
          if (event.kind === 'write') crashed.write(event.bytes, 0, event.bytes.length, event.position);
        }
        expect(await check(crashed, { repair: 'all' }), `after ${last} events`).toMatchObject({
          corruptions: 0,
          leaks: 0,
        });
        if (last % 4 === 0) expectSound(crashed, original);
      }
    }
  });

  it('counting in several windows finds and mends the same', async () => {
    for (const damage of [
      ({ put, header }: Places) => put(header.refcountTableOffset, 512n),
      ({ storage, refcount }: Places) => storage.write(new Uint8Array(600).fill(3), 0, 600, refcount(0)),
      () => {},
    ]) {
      const storage = MemoryStorage.load(original);
      damage(placesIn(storage));
      const whole = await check(storage);
      // The refcount blocks of 4 KiB clusters count 2048 clusters: that is the smallest window.
      const larger = MemoryStorage.load(original);
      larger.truncate(2048 * 4096 * 3);
      damage(placesIn(larger));
      expect(common(await check(larger, { windowClusters: 1 }))).toEqual(common(whole));
      expect(await check(larger, { windowClusters: 1, repair: 'all' })).toMatchObject({ corruptions: 0, leaks: 0 });
      expect(await check(larger)).toMatchObject({ corruptions: 0, leaks: 0 });
    }
  });
});

describe('damage that only its owner can mend is reported, and stays', () => {
  let original = '';
  beforeAll(() => {
    original = makeImage('lost', ['cluster_size=4k']);
  });

  it.each<[string, (places: Places) => void]>([
    [
      'an unaligned L2 table',
      ({ number, put, header }) => put(header.l1TableOffset, number(header.l1TableOffset) + 512n),
    ],
    ['an L2 table behind the end', ({ put, header }) => put(header.l1TableOffset, COPIED | (1n << 40n))],
    [
      'reserved bits in an L1 entry',
      ({ number, put, header }) => put(header.l1TableOffset, number(header.l1TableOffset) | 2n),
    ],
    ['reserved bits in an L2 entry', ({ number, put, dataEntry }) => put(dataEntry, number(dataEntry) | 2n)],
    ['an unaligned data cluster', ({ number, put, dataEntry }) => put(dataEntry, number(dataEntry) + 512n)],
    ['a data cluster behind the end', ({ put, dataEntry }) => put(dataEntry, COPIED | (1n << 40n))],
    ['a data cluster where the L2 table is', ({ put, dataEntry, l2 }) => put(dataEntry, COPIED | BigInt(l2))],
    [
      'a data cluster where the header is',
      ({ put, dataEntry, header }) => put(dataEntry, BigInt(header.l1TableOffset)),
    ],
    ['compressed data behind the end', ({ put, dataEntry }) => put(dataEntry, (1n << 62n) | (1n << 40n))],
    ['a snapshot whose L1 table is behind the end', ({ put, header }) => put(header.snapshotsOffset, 1n << 40n)],
    ['a bitmap table behind the end', ({ put, header }) => put(header.bitmaps!.directoryOffset, 1n << 40n)],
    [
      'a bitmap table entry with reserved bits',
      ({ number, put, header }) => put(Number(number(header.bitmaps!.directoryOffset)), 2n),
    ],
  ])('%s', async (_rule, damage) => {
    const storage = MemoryStorage.load(original);
    damage(placesIn(storage));
    const found = await check(storage);
    expect(found.corruptions).toBeGreaterThan(0);
    // qemu-img finds it too, or does not even open the image.
    expect(spawnSync('qemu-img', ['check', '-f', 'qcow2', saved(storage)]).status).not.toBe(0);

    const header = readHeader(storage);
    const writes = storage.log.length;
    expect(() => rebuildRefcounts(storage, header)).toThrow(CorruptImage);
    expect(storage.log.length).toBe(writes);

    const left = await check(storage, { repair: 'all' });
    expect(left.corruptions).toBeGreaterThan(0);
  });

  it('what an unreadable L2 table may use is not freed', async () => {
    const storage = MemoryStorage.load(original);
    const { put, l1Entry, refcount, number, dataEntry } = placesIn(storage);
    const data = refcount(Number(number(dataEntry) & OFFSET));
    const before = number(data);
    put(l1Entry, COPIED | (1n << 40n));
    for (const repair of ['leaks', 'all'] as const) {
      expect((await check(storage, { repair })).leaks).toBeGreaterThan(0);
      expect(number(data)).toBe(before);
    }
  });

  it('metadata that shares a cluster, though the refcount says so', async () => {
    const storage = MemoryStorage.load(original);
    const { put, dataEntry, l2, refcount } = placesIn(storage);
    put(dataEntry, BigInt(l2));
    put16(storage, refcount(l2), 2);
    const found = await check(storage);
    expect(found.messages.join()).toContain('has another use too');
  });
});

it('snapshot entries without the extra data of version 3 are completed', async () => {
  const original = makeImage('incomplete', ['cluster_size=4k']);
  const storage = MemoryStorage.load(original);
  const header = readHeader(storage);
  const table = encodeSnapshotTable(readSnapshotTable(storage, header).entries);
  // Two entries of 40 + 24 + 1 + 3 bytes, padded to 72; without extra data 48.
  const short = new Uint8Array(96);
  for (let index = 0; index < 2; index++) {
    const entry = table.subarray(index * 72, index * 72 + 72);
    short.set(entry.subarray(0, 36), index * 48);
    short.set(entry.subarray(64, 68), index * 48 + 40);
  }
  storage.write(short, 0, short.length, header.snapshotsOffset);
  expect((await expectAgreement(storage)).corruptions).toBe(2);
  expect(await check(storage, { repair: 'all' })).toMatchObject({ corruptions: 0, leaks: 0, corruptionsFixed: 2 });
  expect(readSnapshotTable(storage, readHeader(storage)).entries[1]!.extraData.length).toBe(24);
  expectSound(storage, original);
});

describe('an image whose writer was killed', () => {
  it('has its lazy refcounts counted anew by the next opener', () => {
    const path = join(folder, 'killed.qcow2');
    qemuImg('create', '-q', '-f', 'qcow2', '-o', 'lazy_refcounts=on,cluster_size=4k', path, '64M');
    execFileSync('qemu-io', ['-c', 'write -P 1 0 1M', path]);
    qemuImg('snapshot', '-c', 'one', path);
    const commands = ['write -P 2 0 9M', 'write -c -P 3 20M 64k', 'discard 100k 100k', 'flush', 'sigraise 9'];
    const died = spawnSync('qemu-io', [...commands.flatMap((command) => ['-c', command]), path]);
    expect(died.signal).toBe('SIGKILL');
    const reference = join(folder, 'reference.qcow2');
    copyFileSync(path, reference);
    qemuImg('check', '-r', 'all', reference);

    const storage = MemoryStorage.load(path);
    expect(readHeader(storage).dirty).toBe(true);
    rebuildRefcounts(storage, readHeader(storage, { refcountsUnusable: true }));
    expect(readHeader(storage).dirty).toBe(false);
    const mended = saved(storage);
    expect(commonOfQemu(qemuCheck(mended))).toMatchObject({ corruptions: 0, leaks: 0 });
    expect(qemuImg('compare', reference, mended)).toContain('identical');
  });

  it('the dirty bit is cleared last, behind a flush', () => {
    const storage = new MemoryStorage();
    formatImage(storage, { size: 1 << 20, preallocation: 'metadata' });
    const { put, refcount } = placesIn(storage);
    put(headerAt.incompatible, 1n);
    put16(storage, refcount(0), 0);
    storage.log.length = 0;
    rebuildRefcounts(storage, readHeader(storage));
    expect(storage.log.slice(-3).map(({ kind }) => kind)).toEqual(['flush', 'write', 'flush']);
    expect(storage.log.at(-2)).toMatchObject({ position: headerAt.incompatible });
  });
});

describe('hostile images', () => {
  it('whose snapshots all claim a large L1 table in the same place are not followed for ever', async () => {
    const storage = new MemoryStorage();
    formatImage(storage, { size: 1 << 30 });
    storage.truncate(64 << 20);
    const entry = { vmClockNs: 0n, vmStateSize: 0, virtualSize: 0, seconds: 0, nanoseconds: 0, icount: undefined };
    const raw = { id: '', idRaw: new Uint8Array(), name: '', nameRaw: new Uint8Array(), extraData: new Uint8Array(24) };
    const entries = Array.from({ length: 60000 }, () => ({
      ...entry,
      ...raw,
      l1TableOffset: 32 << 20,
      l1Entries: 4 << 20,
      problem: undefined,
    }));
    const table = encodeSnapshotTable(entries);
    storage.write(table, 0, table.length, 8 << 20);
    const header = { ...readHeader(storage), snapshotCount: entries.length, snapshotsOffset: 8 << 20 };
    const report = await checkImage(storage, header);
    expect(report.messages.join()).toContain('together are larger than the file');
  });

  it('of many sparse terabytes cost no more than what is in them', async () => {
    const storage = new MemoryStorage();
    formatImage(storage, { size: 1 << 20, clusterBytes: 2 << 20 });
    storage.truncate(2 ** 47);
    expect(await check(storage)).toMatchObject({ corruptions: 0, leaks: 0 });
  });

  it('with thousands of faults keep a hundred messages', async () => {
    const storage = new MemoryStorage();
    formatImage(storage, { size: 1 << 26, preallocation: 'metadata', clusterBytes: 4096 });
    const { refcount } = placesIn(storage);
    storage.write(new Uint8Array(4096), 0, 4096, refcount(0));
    const report = await check(storage);
    expect(report.messages.length).toBe(100);
    expect(report.messagesLeftOut).toBeGreaterThan(1000);
  });
});

it('a check can be stopped, and tells how far it is', async () => {
  const storage = new MemoryStorage();
  formatImage(storage, { size: 1 << 30, preallocation: 'metadata', clusterBytes: 4096 });
  const stop = new AbortController();
  const fractions: number[] = [];
  const work = check(storage, {
    signal: stop.signal,
    onProgress: (fraction) => {
      fractions.push(fraction);
      stop.abort(new Error('stopped'));
    },
  });
  await expect(work).rejects.toThrow('stopped');
  expect(fractions.every((fraction) => fraction >= 0 && fraction <= 1)).toBe(true);
});
