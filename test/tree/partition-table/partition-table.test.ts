import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { readPartitions } from '../../../src/tree/partition-table/partition-table.ts';
import { putGpt, putMbr } from './tables.ts';

const MIB = 1 << 20;
const LINUX = 0x83;

/** [number, start, length] of each, in bytes. */
function partitionsOf(disk: Uint8Array, claimedBytes = disk.length): number[][] {
  const read = (offset: number, length: number) =>
    offset + length > disk.length ? undefined : disk.subarray(offset, offset + length);
  return readPartitions(claimedBytes, read).map(({ number, start, length }) => [number, start, length]);
}

/** Change one byte. */
const damage = (disk: Uint8Array, at: number): void => {
  disk[at] = (disk[at] as number) ^ 0xff;
};

describe('the partitions of an MBR', () => {
  it('have the number of their entry', () => {
    const disk = new Uint8Array(MIB);
    putMbr(disk, 0, [
      undefined,
      { type: LINUX, start: 10, sectors: 5, boot: 0x80 },
      undefined,
      { type: 7, start: 20, sectors: 1 },
    ]);
    expect(partitionsOf(disk)).toEqual([
      [2, 5120, 2560],
      [4, 10_240, 512],
    ]);
  });

  it('are cut at the end of the disk, and absent behind it', () => {
    const disk = new Uint8Array(MIB);
    putMbr(disk, 0, [
      { type: LINUX, start: 2047, sectors: 100 },
      { type: LINUX, start: 2048, sectors: 100 },
      { type: LINUX, start: 0xffff_ffff, sectors: 0xffff_ffff },
    ]);
    expect(partitionsOf(disk)).toEqual([[1, 2047 * 512, 512]]);
  });

  it.each([
    ['a disk of less than a sector has none', 511, () => {}],
    ['an empty disk has none', MIB, () => {}],
    [
      'without the signature there are none',
      MIB,
      (disk: Uint8Array) => {
        putMbr(disk, 0, [{ type: LINUX, start: 1, sectors: 1 }]);
        disk[510] = 0;
      },
    ],
    [
      'a boot indicator other than 0 and 0x80: a FAT boot sector, no table',
      MIB,
      (disk: Uint8Array) => {
        putMbr(disk, 0, [
          { type: LINUX, start: 1, sectors: 1 },
          { type: 0x20, start: 9, sectors: 9, boot: 0x6f },
        ]);
      },
    ],
  ])('%s', (_rule, bytes, fill) => {
    const disk = new Uint8Array(bytes);
    fill(disk);
    expect(partitionsOf(disk)).toEqual([]);
  });
});

describe('logical partitions', () => {
  /** Extended partition at sector 100, 500 sectors; EBRs at 100, 200, 300. */
  const chained = () => {
    const disk = new Uint8Array(MIB);
    putMbr(disk, 0, [
      { type: LINUX, start: 1, sectors: 50 },
      { type: 0x05, start: 100, sectors: 500 },
    ]);
    putMbr(disk, 100 * 512, [
      { type: LINUX, start: 10, sectors: 20 },
      { type: 0x05, start: 100, sectors: 100 },
    ]);
    putMbr(disk, 200 * 512, [
      { type: LINUX, start: 10, sectors: 30 },
      { type: 0x05, start: 200, sectors: 100 },
    ]);
    putMbr(disk, 300 * 512, [{ type: LINUX, start: 10, sectors: 40 }]);
    return disk;
  };

  it('are numbered from 5 along the chain; the extended one is no file', () => {
    expect(partitionsOf(chained())).toEqual([
      [1, 512, 50 * 512],
      [5, 110 * 512, 20 * 512],
      [6, 210 * 512, 30 * 512],
      [7, 310 * 512, 40 * 512],
    ]);
  });

  it('end where the chain comes back to itself', () => {
    const disk = chained();
    putMbr(disk, 300 * 512, [
      { type: LINUX, start: 10, sectors: 40 },
      { type: 0x05, start: 100, sectors: 100 },
    ]);
    expect(partitionsOf(disk).map(([number]) => number)).toEqual([1, 5, 6, 7]);
    putMbr(disk, 200 * 512, [undefined, { type: 0x05, start: 0xffff_ffff, sectors: 1 }]);
    expect(partitionsOf(disk).map(([number]) => number)).toEqual([1, 5, 6]);
  });

  it('end at a record without the signature', () => {
    const disk = chained();
    disk[200 * 512 + 510] = 0;
    expect(partitionsOf(disk).map(([number]) => number)).toEqual([1, 5]);
  });

  it('ignore garbage in the third and fourth entries of a record', () => {
    const disk = chained();
    putMbr(disk, 300 * 512, [
      undefined,
      undefined,
      { type: LINUX, start: 10, sectors: 1e9 },
      { type: LINUX, start: 50, sectors: 5 },
    ]);
    expect(partitionsOf(disk).slice(3)).toEqual([
      [7, 310 * 512, 40 * 512],
      [8, 350 * 512, 5 * 512],
    ]);
  });

  it('are at most as many as Linux takes, whatever the chain says', () => {
    const disk = new Uint8Array(MIB);
    putMbr(disk, 0, [{ type: 0x0f, start: 1, sectors: 2000 }]);
    for (let n = 0; n < 2000; n++) {
      putMbr(disk, (1 + n) * 512, [
        { type: LINUX, start: 1, sectors: 1 },
        { type: 0x05, start: n + 1, sectors: 1 },
      ]);
    }
    expect(partitionsOf(disk).at(-1)?.[0]).toBe(255);
  });
});

describe('the partitions of a GPT', () => {
  const partitions = { 0: [40, 99], 5: [100, 100] } as const;
  const expected = [
    [1, 40 * 512, 60 * 512],
    [6, 100 * 512, 512],
  ];

  it('have the number of their entry', () => {
    const disk = new Uint8Array(MIB);
    putGpt(disk, { partitions });
    expect(partitionsOf(disk)).toEqual(expected);
  });

  it('are found on sectors of 4096 bytes', () => {
    const disk = new Uint8Array(4 * MIB);
    putGpt(disk, { partitions, sectorBytes: 4096 });
    expect(partitionsOf(disk)).toEqual(
      expected.map(([n, start, length]) => [n, (start as number) * 8, (length as number) * 8]),
    );
  });

  it('count only behind a protective MBR: what is left of an old GPT does not', () => {
    const disk = new Uint8Array(MIB);
    putGpt(disk, { partitions });
    disk.fill(0, 0, 512);
    putMbr(disk, 0, [{ type: LINUX, start: 3, sectors: 4 }]);
    expect(partitionsOf(disk)).toEqual([[1, 3 * 512, 4 * 512]]);
  });

  it.each([
    ['header', (at: ReturnType<typeof putGpt>) => at.primary.header + 40],
    ['signature', (at: ReturnType<typeof putGpt>) => at.primary.header],
    ['entries', (at: ReturnType<typeof putGpt>) => at.primary.entries + 32],
  ])('come from the backup when the primary %s is damaged', (_part, place) => {
    const disk = new Uint8Array(MIB);
    const at = putGpt(disk, { partitions });
    damage(disk, place(at));
    expect(partitionsOf(disk)).toEqual(expected);
  });

  it('come from the backup in its old place after the disk has grown', () => {
    const small = new Uint8Array(MIB);
    putGpt(small, { partitions });
    const disk = new Uint8Array(2 * MIB);
    disk.set(small);
    disk.fill(0, 512, 1024);
    expect(partitionsOf(disk)).toEqual(expected);
  });

  it('are none when both copies are damaged', () => {
    const disk = new Uint8Array(MIB);
    const at = putGpt(disk, { partitions });
    damage(disk, at.primary.entries);
    damage(disk, at.backup.header + 9);
    expect(partitionsOf(disk)).toEqual([]);
  });

  it('leave out an entry that ends before it begins, or behind the disk', () => {
    const disk = new Uint8Array(MIB);
    putGpt(disk, {
      partitions: { 0: [50, 49], 1: [50, 2048], 2: [50, 50], 3: [Number.MAX_SAFE_INTEGER, Number.MAX_SAFE_INTEGER] },
    });
    expect(partitionsOf(disk)).toEqual([[3, 50 * 512, 512]]);
  });

  it('may have larger entries, in powers of two', () => {
    const disk = new Uint8Array(MIB);
    putGpt(disk, { partitions: { 0: [600, 601] }, entryBytes: 256 });
    expect(partitionsOf(disk)).toEqual([[1, 600 * 512, 1024]]);
  });

  it('are none where the table claims to be larger than any table', () => {
    const disk = new Uint8Array(8 * MIB);
    putGpt(disk, { partitions: {}, entryCount: 10_000, entryBytes: 128 });
    expect(partitionsOf(disk)).toEqual([]);
  });
});

it('whatever is damaged, partitions lie inside the disk and are numbered once', () => {
  const sector = fc.uint8Array({ minLength: 512, maxLength: 512 });
  fc.assert(
    fc.property(
      fc.constantFrom('gpt', 'mbr'),
      fc.array(fc.tuple(fc.nat(80), sector), { maxLength: 3 }),
      fc.array(fc.tuple(fc.nat(40_000), fc.nat(255)), { maxLength: 8 }),
      (kind, sectors, pokes) => {
        const disk = new Uint8Array(MIB);
        if (kind === 'gpt') putGpt(disk, { partitions: { 0: [40, 99], 3: [100, 200] } });
        else {
          putMbr(disk, 0, [
            { type: LINUX, start: 1, sectors: 9 },
            { type: 0x05, start: 10, sectors: 50 },
          ]);
          putMbr(disk, 5120, [
            { type: LINUX, start: 1, sectors: 9 },
            { type: 0x05, start: 10, sectors: 50 },
          ]);
        }
        for (const [number, bytes] of sectors) {
          disk.set(bytes, number * 512);
          disk.set([0x55, 0xaa], number * 512 + 510);
        }
        for (const [place, value] of pokes) disk[place] = value;
        const found = partitionsOf(disk);
        for (const [, start, length] of found) {
          expect(start).toBeGreaterThanOrEqual(0);
          expect(length).toBeGreaterThan(0);
          expect((start as number) + (length as number)).toBeLessThanOrEqual(disk.length);
        }
        expect(new Set(found.map(([number]) => number)).size).toBe(found.length);
      },
    ),
  );
});

describe('tables that others write', () => {
  const onDisk = (bytes: number, program: string, args: (path: string) => string[]): number[][] => {
    const folder = mkdtempSync(join(tmpdir(), 'vdskfs-partitions-'));
    try {
      const path = join(folder, 'disk');
      writeFileSync(path, '');
      truncateSync(path, bytes);
      execFileSync(program, args(path), { stdio: 'ignore' });
      return partitionsOf(readFileSync(path));
    } finally {
      rmSync(folder, { recursive: true });
    }
  };

  it('sgdisk, with a gap in the numbers', () => {
    expect(onDisk(8 * MIB, 'sgdisk', (path) => ['-n', '1:2048:4095', '-n', '7:4096:6143', path])).toEqual([
      [1, MIB, MIB],
      [7, 2 * MIB, MIB],
    ]);
  });

  it('parted, an MBR with logical partitions', () => {
    const parts = ['primary 2048s 4095s', 'extended 4096s 16383s', 'logical 6144s 7167s', 'logical 10240s 12287s'];
    const words = parts.flatMap((part) => ['mkpart', ...part.split(' ')]);
    expect(onDisk(16 * MIB, 'parted', (path) => ['-s', '-a', 'none', path, 'mklabel', 'msdos', ...words])).toEqual([
      [1, MIB, MIB],
      [5, 3 * MIB, MIB / 2],
      [6, 5 * MIB, MIB],
    ]);
  });
});
