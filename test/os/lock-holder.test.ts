import { closeSync, mkdtempSync, openSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { findLockHolder, parseLocks } from '../../src/os/lock-holder.ts';
import { systemCalls } from '../../src/os/system-calls.ts';

describe('the locks in an fdinfo file', () => {
  it('are its lock lines, whatever their kind; the range may go to the end of the file', () => {
    const text = [
      'pos:\t0',
      'flags:\t02100002',
      'mnt_id:\t29',
      'ino:\t1234',
      'lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101',
      'lock:\t2: POSIX  ADVISORY  WRITE 815 fe:00:1234 0 EOF',
      'lock:\t3: FLOCK  ADVISORY  WRITE 815 fe:00:1234 0 EOF',
      '',
    ].join('\n');
    expect(parseLocks(text)).toEqual([
      { file: 'fe:00:1234', first: 100, last: 101 },
      { file: 'fe:00:1234', first: 0, last: Number.POSITIVE_INFINITY },
      { file: 'fe:00:1234', first: 0, last: Number.POSITIVE_INFINITY },
    ]);
    expect(parseLocks('')).toEqual([]);
  });
});

describe.runIf(process.platform === 'linux')('the holder of a lock', () => {
  it('is another descriptor, of this process too, that has the byte', () => {
    const folder = mkdtempSync(join(tmpdir(), 'vdskfs-holder-'));
    const path = join(folder, 'a');
    writeFileSync(path, '');
    const [mine, theirs] = [openSync(path, 'r+'), openSync(path, 'r+')];
    try {
      systemCalls().lockByte(mine, { offset: 5, kind: 'shared' });
      expect(findLockHolder(mine, 5)).toBeUndefined();
      systemCalls().lockByte(theirs, { offset: 5, kind: 'shared' });
      expect(findLockHolder(mine, 5)?.pid).toBe(process.pid);
      expect(findLockHolder(mine, 6)).toBeUndefined();
    } finally {
      closeSync(mine);
      closeSync(theirs);
      rmSync(folder, { recursive: true });
    }
  });
});
