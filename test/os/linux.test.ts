import { closeSync, mkdtempSync, openSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { errnoNumber } from '../../src/os/errno.ts';
import { encodeByteLock, isFree, linux } from '../../src/os/linux.ts';

describe('struct flock', () => {
  it('for one byte: l_type, l_whence, padding, l_start, l_len, l_pid', () => {
    expect([...encodeByteLock({ offset: 0x0102, kind: 'exclusive' })]).toEqual([
      ...[1, 0, 0, 0, 0, 0, 0, 0], // F_WRLCK, SEEK_SET
      ...[2, 1, 0, 0, 0, 0, 0, 0], // start 0x102
      ...[1, 0, 0, 0, 0, 0, 0, 0], // one byte
      ...[0, 0, 0, 0, 0, 0, 0, 0], // the process number must be 0 for these locks
    ]);
  });

  it.each([
    ['shared', 0],
    ['exclusive', 1],
    ['none', 2],
  ] as const)('%s is type %i', (kind, type) => {
    const lock = encodeByteLock({ offset: 0, kind });
    expect(lock[0]).toBe(type);
    expect(isFree(lock)).toBe(kind === 'none');
  });
});

describe.runIf(process.platform === 'linux')('the calls', () => {
  it('answer with negated errno numbers', () => {
    expect(linux.seek(1_000_000, 0, 'data')).toBe(-errnoNumber('EBADF'));
    expect(linux.punchHole(1_000_000, 0, 1)).toBe(-errnoNumber('EBADF'));
    expect(linux.lockByte(1_000_000, { offset: 0, kind: 'shared' })).toBe(-errnoNumber('EBADF'));
    expect(linux.lockFile(1_000_000, 'shared')).toBe(-errnoNumber('EBADF'));
  });

  it('lock bytes and files between descriptors, zero ranges, and find the end', () => {
    const folder = mkdtempSync(join(tmpdir(), 'vdskfs-linux-'));
    const path = join(folder, 'a');
    writeFileSync(path, new Uint8Array(8192).fill(1));
    const [one, other] = [openSync(path, 'r+'), openSync(path, 'r+')];
    try {
      expect(linux.lockByte(one, { offset: 5, kind: 'exclusive' })).toBe(0);
      expect(linux.lockByte(other, { offset: 5, kind: 'shared' })).toBe(-errnoNumber('EAGAIN'));
      expect(linux.testByte(other, { offset: 5, kind: 'shared' })).toBe(-errnoNumber('EAGAIN'));
      expect(linux.testByte(other, { offset: 6, kind: 'exclusive' })).toBe(0);
      expect(linux.testByte(one, { offset: 5, kind: 'exclusive' })).toBe(0);
      expect(linux.lockByte(one, { offset: 5, kind: 'none' })).toBe(0);
      expect(linux.lockByte(other, { offset: 5, kind: 'shared' })).toBe(0);

      expect(linux.lockFile(one, 'exclusive')).toBe(0);
      expect(linux.lockFile(other, 'shared')).toBe(-errnoNumber('EAGAIN'));
      expect(linux.lockFile(one, 'none')).toBe(0);
      expect(linux.lockFile(other, 'shared')).toBe(0);

      expect(linux.seek(one, 0, 'end')).toBe(8192);
      expect([0, -errnoNumber('ENOTSUP')]).toContain(linux.zeroRange(one, 0, 4096));
    } finally {
      closeSync(one);
      closeSync(other);
      rmSync(folder, { recursive: true });
    }
  });
});
