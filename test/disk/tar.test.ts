/** Headers that other programs read. */
import { execFileSync } from 'node:child_process';
import { describe, expect, it } from 'vitest';
import { TAR_END_BYTES, tarHeader } from '../../src/disk/tar.ts';

/** What tar lists of an archive with this one header; it does not miss the data. */
const listed = (header: Uint8Array): string =>
  execFileSync('tar', ['tvf', '-', '--utc'], {
    input: Buffer.concat([header, Buffer.alloc(TAR_END_BYTES)]),
    encoding: 'utf8',
    stdio: ['pipe', 'pipe', 'ignore'],
  });

describe('a tar header', () => {
  it('is that of a plain file', () => {
    const header = tarHeader('state.kern', 0, Date.UTC(2026, 0, 2, 3, 4, 5));
    expect(header.length).toBe(512);
    expect(listed(header)).toMatch(/^-rw-r--r-- 0\/0 +0 2026-01-02 03:04 state\.kern\n$/);
  });

  it.each([
    ['octal', 8 ** 11 - 1, '77777777777\0'],
    ['binary from 8 GiB on', 8 ** 11, '\x80\0\0\0\0\0\0\x02\0\0\0\0'],
    ['binary', 2 ** 50 + 3, '\x80\0\0\0\0\x04\0\0\0\0\0\x03'],
  ])('has its size in %s', (_how, bytes, field) => {
    const header = tarHeader('state', bytes, 0);
    expect(Buffer.from(header.subarray(124, 136)).toString('latin1')).toBe(field);
    const sum = header.reduce((total, byte, at) => total + (at >= 148 && at < 156 ? 0x20 : byte), 0);
    expect(Number.parseInt(Buffer.from(header.subarray(148, 154)).toString(), 8)).toBe(sum);
  });
});
