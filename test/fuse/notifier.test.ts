import { describe, expect, it } from 'vitest';
import { encodeInvalEntry, encodeInvalInode } from '../../src/fuse/notifier.ts';

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex');

describe('a notification', () => {
  it('INVAL_INODE: unique 0, code 2, the node, from 0 to the end', () => {
    expect(hex(encodeInvalInode(77))).toBe(
      '28000000' + // len 40
        '02000000' +
        '0000000000000000' + // unique
        '4d00000000000000' + // ino
        '0000000000000000' + // off
        '0000000000000000', // len: to the end
    );
  });

  it('INVAL_ENTRY: unique 0, code 3, the directory, the name with a NUL that its length does not count', () => {
    expect(hex(encodeInvalEntry(1, 'abc'))).toBe(
      '24000000' + // len 36
        '03000000' +
        '0000000000000000' + // unique
        '0100000000000000' + // parent
        '03000000' + // namelen
        '00000000' + // flags
        '61626300',
    );
  });
});
