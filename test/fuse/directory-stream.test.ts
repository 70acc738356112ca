import { describe, expect, it } from 'vitest';
import { DirectoryStream } from '../../src/fuse/directory-stream.ts';

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex');
const file = { name: 'abc', ino: 5, kind: 'file' } as const;

describe('a directory stream', () => {
  it('is empty at the end of the listing', () => {
    expect(new DirectoryStream(4096).bytes()).toHaveLength(0);
  });

  it('dirent: ino, cookie of the next entry, length of the name, type, name padded to 8 bytes', () => {
    const stream = new DirectoryStream(4096);
    stream.add(file, 3);
    stream.add({ name: 'directory', ino: 1, kind: 'directory' }, 4);
    expect(hex(stream.bytes())).toBe(
      '0500000000000000' + // ino
        '0300000000000000' + // off
        '03000000' + // namelen
        '08000000' + // DT_REG
        '6162630000000000' +
        '0100000000000000' +
        '0400000000000000' +
        '09000000' +
        '04000000' + // DT_DIR
        '6469726563746f727900000000000000',
    );
  });

  it('direntplus: ENTRY in front; zeros there say that no attributes are known', () => {
    const stream = new DirectoryStream(4096);
    stream.addPlus(file, 3, undefined);
    expect(hex(stream.bytes())).toBe(
      `${'00'.repeat(128)}0500000000000000030000000000000003000000080000006162630000000000`,
    );
  });

  it('takes what fits to the byte and no more', () => {
    const stream = new DirectoryStream(64);
    expect(stream.fits(file, false)).toBe(true);
    stream.add(file, 1);
    expect(stream.fits(file, false)).toBe(true);
    stream.add(file, 2);
    expect(stream.fits({ ...file, name: '' }, false)).toBe(false);
    expect(stream.bytes()).toHaveLength(64);
  });

  it('counts a name in bytes', () => {
    const stream = new DirectoryStream(32);
    expect(stream.fits({ ...file, name: '12345678' }, false)).toBe(true);
    expect(stream.fits({ ...file, name: '1234567ä' }, false)).toBe(false);
  });

  it('needs 128 bytes more with attributes', () => {
    expect(new DirectoryStream(159).fits(file, true)).toBe(false);
    expect(new DirectoryStream(160).fits(file, true)).toBe(true);
  });
});
