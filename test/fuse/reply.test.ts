import { describe, expect, it } from 'vitest';
import type { Attributes } from '../../src/fuse/filesystem.ts';
import {
  encodeAttr,
  encodeCreate,
  encodeEmptyReply,
  encodeEntry,
  encodeLseek,
  encodeOpen,
  encodeReplyHeader,
  encodeStatfs,
  encodeWrite,
  openFlags,
} from '../../src/fuse/reply.ts';

const node = { ino: 0x1234, attributesValidMs: 1500, entryValidMs: 2250 };
const attributes: Attributes = {
  mode: 0o100640,
  nlink: 1,
  uid: 1000,
  gid: 100,
  size: 0x1_0000_0001,
  allocatedBytes: 1025,
  atimeMs: 1_000_001,
  mtimeMs: 2_000_250.5,
  ctimeMs: -1,
};

/** fuse_attr of the above. */
const attr =
  '3412000000000000' + // ino
  '0100000001000000' + // size
  '0300000000000000' + // blocks of 512 bytes, rounded up
  'e803000000000000' + // atime, 1000 s
  'd007000000000000' + // mtime, 2000 s
  'ffffffffffffffff' + // ctime, -1 s
  '40420f00' + // atimensec 1,000,000
  'a053ee0e' + // mtimensec 250,500,000
  'c0878b3b' + // ctimensec 999,000,000
  'a0810000' + // mode
  '01000000' + // nlink
  'e8030000' + // uid
  '64000000' + // gid
  '00000000' + // rdev
  '00100000' + // blksize 4096
  '00000000'; // flags

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex');

describe('a reply', () => {
  it('ENTRY: nodeid, generation, how long name and attributes hold, attributes: 128 bytes', () => {
    const entry = encodeEntry(node, attributes);
    expect(entry).toHaveLength(128);
    expect(hex(entry)).toBe(
      '3412000000000000' + // nodeid
        '0000000000000000' + // generation
        '0200000000000000' + // entry_valid
        '0100000000000000' + // attr_valid
        '80b2e60e' + // entry_valid_nsec 250,000,000
        '0065cd1d' + // attr_valid_nsec 500,000,000
        attr,
    );
  });

  it('ATTR_OUT: how long it holds, attributes: 104 bytes', () => {
    const answer = encodeAttr(node, attributes);
    expect(answer).toHaveLength(104);
    expect(hex(answer)).toBe(`01000000000000000065cd1d00000000${attr}`);
  });

  it('OPEN_OUT: fh, flags, backing id: 16 bytes', () => {
    expect(hex(encodeOpen(4097, 65))).toBe('01100000000000004100000000000000');
  });

  it('CREATE: ENTRY then OPEN_OUT: 144 bytes', () => {
    expect(encodeCreate(encodeEntry(node, attributes), encodeOpen(1, 0))).toHaveLength(144);
  });

  it('WRITE and LSEEK: 8 bytes', () => {
    expect(hex(encodeWrite(4096))).toBe('0010000000000000');
    expect(hex(encodeLseek(0x1_0000_1000))).toBe('0010000001000000');
  });

  it('STATFS: blocks of blockBytes: 80 bytes', () => {
    const answer = encodeStatfs({
      blockBytes: 4096,
      totalBytes: 0x10_0000,
      freeBytes: 0x8000,
      availableBytes: 0x4fff,
      files: 9,
    });
    expect(answer).toHaveLength(80);
    expect(hex(answer)).toBe(
      '0001000000000000' + // blocks
        '0800000000000000' + // bfree
        '0400000000000000' + // bavail
        '0900000000000000' + // files
        '0000000000000000' + // ffree
        '00100000' + // bsize
        'ff000000' + // namelen
        '00100000' + // frsize
        '00'.repeat(28),
    );
  });

  it('an error is a header alone: 16 bytes with the negated errno', () => {
    expect(hex(encodeEmptyReply(0xff00_0000_0000_0002n, -2))).toBe('10000000feffffff02000000000000ff');
  });

  it('the header counts itself and the body', () => {
    expect(hex(encodeReplyHeader(8n, 4))).toBe('14000000000000000800000000000000');
  });

  it.each([
    ['direct: DIRECT_IO, PARALLEL_DIRECT_WRITES', 'direct', 0x41],
    ['keep: KEEP_CACHE', 'keep', 2],
    ['fresh: nothing, which drops older pages', 'fresh', 0],
  ] as const)('flags of an open file, %s', (_rule, caching, flags) => {
    expect(openFlags(caching)).toBe(flags);
  });
});
