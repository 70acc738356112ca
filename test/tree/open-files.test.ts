import { describe, expect, it } from 'vitest';
import type { Checkpoint } from '../../src/disk/disk.ts';
import { OpenFiles, type OpenRecord } from '../../src/tree/open-files.ts';
import { errnoOf } from './walk.ts';

const LONG_MS = 60_000;
const writing = (label: string, start: number, end: number): OpenRecord => ({
  label,
  checkpoint: () => undefined,
  writes: { start, end },
});
const reading = (label: string, checkpoint?: Checkpoint): OpenRecord => ({
  label,
  checkpoint: () => checkpoint,
  writes: undefined,
});
const disk = writing('disk.raw', 0, Number.POSITIVE_INFINITY);
const first = writing('partitions/1.raw', 512, 1024);
const second = writing('partitions/2.raw', 1024, 2048);
const checkpoint = { name: 'a' } as Checkpoint;

describe('the open files of a disk', () => {
  it.each<[string, OpenRecord, OpenRecord, string]>([
    ['the disk and a partition overlap', disk, first, 'EBUSY'],
    ['a partition and the disk overlap', first, disk, 'EBUSY'],
    ['partitions side by side do not', first, second, 'no error'],
    ['the same file may be opened twice', disk, disk, 'no error'],
    ['readers are never in the way', reading('disk.raw'), first, 'no error'],
    ['writers are not in the way of readers', disk, reading('partitions/1.raw'), 'no error'],
  ])('%s', async (_rule, one, other, errno) => {
    const files = new OpenFiles(0);
    await files.add(one);
    expect(await errnoOf(files.add(other))).toBe(errno);
  });

  it('name the file that is in the way', async () => {
    const files = new OpenFiles(0);
    await files.add(first);
    await expect(files.add(disk)).rejects.toThrow(/disk\.raw cannot be opened for writing: partitions\/1\.raw is open/);
  });

  it('are waited for where their release is on its way', async () => {
    const files = new OpenFiles(LONG_MS);
    const leave = await files.add(first);
    const opened = files.add(disk);
    leave();
    await opened;
    expect(files.writers()).toEqual([disk]);
  });

  it('let one of two openers in, not both', async () => {
    const files = new OpenFiles(LONG_MS);
    const leave = await files.add(disk);
    const both = [files.add(first), files.add(writing('partitions/3.raw', 0, 600))];
    leave();
    const winner = await Promise.race(both);
    expect(files.writers()).toHaveLength(1);
    winner();
    await Promise.all(both);
  });

  it('keep a checkpoint from being ended while one of its files is open', async () => {
    const files = new OpenFiles(0);
    const leave = await files.add(reading('snapshots/a/disk.raw', checkpoint));
    const end = () => files.whileUnopened(checkpoint, async () => 'ended');
    await expect(end()).rejects.toThrow(/"a" is in use: snapshots\/a\/disk\.raw is open/);
    leave();
    expect(await end()).toBe('ended');
  });

  it('cannot become more while the checkpoint is being ended', async () => {
    const files = new OpenFiles(0);
    await files.whileUnopened(checkpoint, async () => {
      expect(await errnoOf(files.add(reading('snapshots/a/disk.raw', checkpoint)))).toBe('EBUSY');
    });
    expect(await errnoOf(files.add(reading('snapshots/a/disk.raw', checkpoint)))).toBe('no error');
  });

  it('leave the live contents to one exclusive operation at a time', async () => {
    const files = new OpenFiles(0);
    const leave = await files.add(first);
    expect(await errnoOf(files.exclusively('rollback', async () => {}))).toBe('EBUSY');
    leave();
    await files.exclusively('rollback', async () => {
      expect(await errnoOf(files.add(first))).toBe('EBUSY');
      expect(await errnoOf(files.add(reading('disk.raw')))).toBe('no error');
      expect(await errnoOf(files.exclusively('resize', async () => {}))).toBe('EBUSY');
    });
    expect(await errnoOf(files.add(first))).toBe('no error');
  });

  it('open again after an exclusive operation failed', async () => {
    const files = new OpenFiles(0);
    await expect(files.exclusively('rollback', () => Promise.reject(new Error('no')))).rejects.toThrow('no');
    expect(await errnoOf(files.add(first))).toBe('no error');
  });
});
