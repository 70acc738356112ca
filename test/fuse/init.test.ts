import { describe, expect, it } from 'vitest';
import { answerInit, decodeInit } from '../../src/fuse/init.ts';
import { integers } from './kernel-message.ts';

/** As Linux 6.18 offers: minor 45, flags2 behind INIT_EXT, 64 bytes. */
const linux618 = Buffer.concat([
  integers([7, 4], [45, 4], [131072, 4], [0x73ff_fffb, 4], [0x5fd, 4]),
  Buffer.alloc(44),
]);
/** As FreeBSD 14 offers: ASYNC_READ, POSIX_LOCKS, EXPORT_SUPPORT, BIG_WRITES, WRITEBACK_CACHE, NO_OPEN…; 16 bytes. */
const freebsd14 = integers([7, 4], [35, 4], [65536, 4], [0x0103_0033, 4]);

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex');

describe('INIT', () => {
  it('on Linux 6.18 agrees on minor 31 and on each wanted flag, in 64 bytes', () => {
    const { body, agreed } = answerInit(decodeInit(linux618), 'linux');
    expect(agreed).toBe(true);
    expect(hex(body)).toBe(
      '07000000' + // major
        '1f000000' + // minor 31
        '00000200' + // max_readahead
        // ASYNC_READ, BIG_WRITES, DO_READDIRPLUS, READDIRPLUS_AUTO, ASYNC_DIO, PARALLEL_DIROPS, MAX_PAGES,
        // HANDLE_KILLPRIV_V2, INIT_EXT
        '21e04450' +
        '4000' + // max_background 64
        '3000' + // congestion_threshold 48
        '00001000' + // max_write 1 MiB
        '01000000' + // time_gran
        '0001' + // max_pages 256
        '0000' + // map_alignment
        '10000000' + // flags2: DIRECT_IO_ALLOW_MMAP
        '00'.repeat(28),
    );
  });

  it('on FreeBSD answers exactly 64 bytes with offered flags only', () => {
    const { body } = answerInit(decodeInit(freebsd14), 'freebsd');
    expect(hex(body)).toBe(
      '07000000' +
        '1f000000' +
        '00000100' +
        '21000000' + // ASYNC_READ, BIG_WRITES
        '0000' +
        '0000' +
        '00001000' +
        '01000000' +
        '00'.repeat(36),
    );
  });

  it('never answers a flag that was not offered', () => {
    const { body } = answerInit({ major: 7, minor: 23, maxReadahead: 0, flags: 0, flags2: 0xffff_ffff }, 'linux');
    expect(hex(body.subarray(12, 16))).toBe('00000000');
    expect(hex(body.subarray(28, 30))).toBe('0000'); // no MAX_PAGES, no max_pages
    expect(hex(body.subarray(32, 36))).toBe('00000000');
  });

  it('speaks the version of a kernel older than 31', () => {
    const { body } = answerInit({ major: 7, minor: 27, maxReadahead: 0, flags: 1, flags2: 0 }, 'linux');
    expect(hex(body.subarray(4, 8))).toBe('1b000000');
  });

  it('asks a kernel of a later major version to come back with ours', () => {
    const { body, agreed } = answerInit({ major: 8, minor: 0, maxReadahead: 0, flags: 0, flags2: 0 }, 'linux');
    expect(agreed).toBe(false);
    expect(hex(body.subarray(0, 4))).toBe('07000000');
  });

  it.each([
    ['7.22', 7, 22],
    ['6.40', 6, 40],
  ])('refuses a kernel that speaks %s, naming it', (version, major, minor) => {
    expect(() => answerInit({ major, minor, maxReadahead: 0, flags: 0, flags2: 0 }, 'linux')).toThrow(version);
  });

  it('reads flags2 only behind INIT_EXT and in the long request', () => {
    const withoutExt = Buffer.from(linux618);
    withoutExt.writeUInt32LE(0x33ff_fffb, 12);
    expect(decodeInit(withoutExt).flags2).toBe(0);
    expect(decodeInit(linux618.subarray(0, 16)).flags2).toBe(0);
    expect(decodeInit(linux618).flags2).toBe(0x5fd);
  });
});
