import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { type CreateOptions, createImage, type FormatOptions, formatImage } from '../../src/qcow2/create.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import { MemoryStorage } from './memory-storage.ts';

const folder = mkdtempSync(join(tmpdir(), 'vdskfs-create-'));
afterAll(() => rmSync(folder, { recursive: true }));
let count = 0;
const fresh = (): string => join(folder, `disk-${count++}.qcow2`);

const MiB = 2 ** 20;
const GiB = 2 ** 30;
const TiB = 2 ** 40;

function errnoOf(action: () => void): string {
  try {
    action();
    return 'done';
  } catch (error) {
    if (!(error instanceof FsError)) throw error;
    return `${error.errno}: ${error.message}`;
  }
}

interface Info {
  'virtual-size': number;
  'cluster-size': number;
  'backing-filename'?: string;
  'backing-filename-format'?: string;
  'format-specific': { data: Record<string, unknown> };
}

/** qemu-img's opinion; it must find nothing wrong. */
function qemuInfo(path: string): Info {
  const check = spawnSync('qemu-img', ['check', '-f', 'qcow2', path], { encoding: 'utf8' });
  expect(check.stderr + (check.status === 0 ? '' : check.stdout)).toBe('');
  return JSON.parse(
    execFileSync('qemu-img', ['info', '-f', 'qcow2', '--output=json', path], { encoding: 'utf8' }),
  ) as Info;
}

describe('qemu-img finds nothing wrong with', () => {
  it.each<[string, FormatOptions, Record<string, unknown>]>([
    ['the defaults', { size: GiB }, { compat: '1.1', 'refcount-bits': 16, 'compression-type': 'zlib' }],
    ['version 2', { size: GiB, version: 2 }, { compat: '0.10' }],
    ['a disk of no bytes', { size: 0 }, {}],
    ['a disk of one sector', { size: 512 }, {}],
    ['64 TiB', { size: 64 * TiB }, {}],
    ['64 TiB in 2 MiB clusters', { size: 64 * TiB, clusterBytes: 2 * MiB }, {}],
    ['clusters of 512 bytes', { size: 100 * MiB, clusterBytes: 512 }, {}],
    ['the largest disk of 512-byte clusters', { size: 128 * GiB, clusterBytes: 512 }, {}],
    ['refcounts of 1 bit', { size: GiB, refcountBits: 1 }, { 'refcount-bits': 1 }],
    [
      'refcounts of 64 bits in small clusters',
      { size: GiB, refcountBits: 64, clusterBytes: 512 },
      { 'refcount-bits': 64 },
    ],
    ['extended L2 entries', { size: GiB, extendedL2: true }, { 'extended-l2': true }],
    ['lazy refcounts', { size: GiB, lazyRefcounts: true }, { 'lazy-refcounts': true }],
    ['zstd', { size: GiB, compressionType: 'zstd' }, { 'compression-type': 'zstd' }],
    ['preallocated metadata', { size: GiB, preallocation: 'metadata' }, {}],
    ['preallocated metadata, version 2', { size: 100 * MiB, preallocation: 'metadata', version: 2 }, {}],
    [
      'preallocated metadata, 4-bit refcounts',
      { size: 65 * MiB, preallocation: 'metadata', clusterBytes: 4096, refcountBits: 4 },
      {},
    ],
    [
      'preallocated metadata, tiny clusters',
      { size: 9 * MiB + 512, preallocation: 'metadata', clusterBytes: 512, refcountBits: 64 },
      {},
    ],
    ['preallocated subclusters', { size: GiB + 512, preallocation: 'metadata', extendedL2: true }, {}],
  ])('%s', (_rule, options, expected) => {
    const path = fresh();
    createImage(path, options);
    const info = qemuInfo(path);
    expect(info).toMatchObject({
      'virtual-size': options.size,
      'cluster-size': options.clusterBytes ?? 65536,
      'format-specific': { data: expected },
    });
    if (options.size <= GiB) {
      // All of it reads as zeros.
      const zeros = join(folder, 'zeros.raw');
      writeFileSync(zeros, '');
      truncateSync(zeros, options.size);
      expect(
        execFileSync('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', zeros, path], { encoding: 'utf8' }),
      ).toContain('identical');
    }
    rmSync(path);
  });

  it('what it writes to the image afterwards', () => {
    for (const options of [
      { size: GiB, preallocation: 'metadata' },
      { size: GiB, clusterBytes: 512, refcountBits: 8 },
    ] as const) {
      const path = fresh();
      createImage(path, options);
      execFileSync('qemu-io', [
        '-c',
        'write -P 7 1000k 3M',
        '-c',
        'write -P 8 800M 64k',
        '-c',
        'read -P 7 1000k 3M',
        path,
      ]);
      qemuInfo(path);
    }
  });

  it('the size is in whole sectors', () => {
    const path = fresh();
    createImage(path, { size: 1000 });
    expect(qemuInfo(path)['virtual-size']).toBe(1024);
  });
});

describe('with a backing file', () => {
  const base = join(folder, 'base.qcow2');
  createImage(base, { size: 3 * MiB });

  it('the size is its size, and the name is recorded as given', () => {
    const path = fresh();
    createImage(path, { backing: { file: 'base.qcow2', format: 'qcow2' } });
    expect(qemuInfo(path)).toMatchObject({
      'virtual-size': 3 * MiB,
      'backing-filename': 'base.qcow2',
      'backing-filename-format': 'qcow2',
    });
  });

  it('a raw one counts in whole sectors', () => {
    writeFileSync(join(folder, 'base.raw'), 'x'.repeat(700));
    const path = fresh();
    createImage(path, { backing: { file: join(folder, 'base.raw'), format: 'raw' } });
    expect(qemuInfo(path)['virtual-size']).toBe(1024);
    expect(execFileSync('qemu-io', ['-c', 'read -P 0x78 0 700', path], { encoding: 'utf8' })).not.toContain('failed');
  });

  it('preallocated subclusters show it', () => {
    execFileSync('qemu-io', ['-c', 'write -P 9 0 3M', base]);
    const path = fresh();
    createImage(path, { backing: { file: base, format: 'qcow2' }, preallocation: 'metadata', extendedL2: true });
    expect(execFileSync('qemu-io', ['-c', 'read -P 9 0 3M', path], { encoding: 'utf8' })).not.toContain('failed');
    qemuInfo(path);
  });

  it('that is not there, nothing is made', () => {
    const path = fresh();
    const options: CreateOptions = { size: MiB, backing: { file: 'nowhere.qcow2', format: 'qcow2' } };
    expect(errnoOf(() => createImage(path, options))).toMatch(/^ENOENT/);
    expect(existsSync(path)).toBe(false);
  });
});

describe('with an external data file', () => {
  it('both files are made', () => {
    const path = fresh();
    createImage(path, { size: 10 * MiB, dataFile: { file: join(folder, 'data-1.raw') } });
    expect(statSync(join(folder, 'data-1.raw')).size).toBe(10 * MiB);
    expect(qemuInfo(path)['format-specific'].data).toMatchObject({ 'data-file': join(folder, 'data-1.raw') });
  });

  it('a raw one is mapped in full', () => {
    const path = fresh();
    createImage(path, { size: 10 * MiB, dataFile: { file: join(folder, 'data-2.raw'), raw: true } });
    expect(qemuInfo(path)['format-specific'].data).toMatchObject({ 'data-file-raw': true });
    const map = execFileSync('qemu-img', ['map', '--output=json', path], { encoding: 'utf8' });
    expect((JSON.parse(map) as { offset?: number }[])[0]).toMatchObject({ start: 0, length: 10 * MiB, offset: 0 });
  });

  it('that exists already, nothing is made and it stays', () => {
    writeFileSync(join(folder, 'data-3.raw'), 'mine');
    const path = fresh();
    expect(errnoOf(() => createImage(path, { size: MiB, dataFile: { file: 'data-3.raw' } }))).toMatch(/^EEXIST/);
    expect([existsSync(path), statSync(join(folder, 'data-3.raw')).size]).toEqual([false, 4]);
  });
});

describe('it is refused to make', () => {
  it.each<[string, FormatOptions, string]>([
    ['a disk of less than no bytes', { size: -1 }, 'EINVAL'],
    ['a disk of half a byte', { size: 0.5 }, 'EINVAL'],
    ['a disk over 2^53 bytes', { size: 2 ** 53 }, 'EINVAL'],
    ['clusters of 1000 bytes', { size: 0, clusterBytes: 1000 }, 'EINVAL'],
    ['clusters of 256 bytes', { size: 0, clusterBytes: 256 }, 'EINVAL'],
    ['clusters of 4 MiB', { size: 0, clusterBytes: 4 * MiB }, 'EINVAL'],
    ['refcounts of 3 bits', { size: 0, refcountBits: 3 }, 'EINVAL'],
    ['refcounts of 128 bits', { size: 0, refcountBits: 128 }, 'EINVAL'],
    ['version 2 with other refcounts', { size: 0, version: 2, refcountBits: 8 }, 'EINVAL'],
    ['version 2 with zstd', { size: 0, version: 2, compressionType: 'zstd' }, 'EINVAL'],
    ['version 2 with lazy refcounts', { size: 0, version: 2, lazyRefcounts: true }, 'EINVAL'],
    ['version 2 with subclusters', { size: 0, version: 2, extendedL2: true }, 'EINVAL'],
    ['version 2 with a data file', { size: 0, version: 2, dataFile: { file: 'd' } }, 'EINVAL'],
    ['subclusters under 512 bytes', { size: 0, extendedL2: true, clusterBytes: 8192 }, 'EINVAL'],
    [
      'preallocation over a backing file',
      { size: 0, preallocation: 'metadata', backing: { file: 'b', format: 'raw' } },
      'EINVAL',
    ],
    [
      'a raw data file over a backing file',
      { size: 0, dataFile: { file: 'd', raw: true }, backing: { file: 'b', format: 'raw' } },
      'EINVAL',
    ],
    ['a backing name over 1023 bytes', { size: 0, backing: { file: 'b'.repeat(1024), format: 'raw' } }, 'EINVAL'],
    [
      'a backing name that does not fit in the cluster',
      { size: 0, clusterBytes: 512, backing: { file: 'b'.repeat(400), format: 'raw' } },
      'EINVAL',
    ],
    ['more than 512-byte clusters can map', { size: 128 * GiB + 512, clusterBytes: 512 }, 'EFBIG'],
  ])('%s', (_rule, options, errno) => {
    const storage = new MemoryStorage();
    expect(errnoOf(() => formatImage(storage, options))).toMatch(errno);
    expect(storage.size()).toBe(0);
  });

  it('a file that exists', () => {
    const path = fresh();
    writeFileSync(path, 'mine');
    expect(errnoOf(() => createImage(path, { size: MiB }))).toMatch(/^EEXIST/);
    expect(statSync(path).size).toBe(4);
  });
});

it('the header is the last write, behind a flush: before it the file is no image', () => {
  const storage = new MemoryStorage();
  formatImage(storage, { size: GiB, preallocation: 'metadata' });
  const kinds = storage.log.map((event) => event.kind);
  expect(kinds.slice(-3)).toEqual(['flush', 'write', 'flush']);
  expect(storage.log.at(-2)).toMatchObject({ position: 0 });
  expect(storage.log.slice(0, -3).some((event) => event.kind === 'write' && event.position === 0)).toBe(false);
  expect(readHeader(storage).size).toBe(GiB);
});
