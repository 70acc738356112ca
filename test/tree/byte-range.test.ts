import { describe, expect, it } from 'vitest';
import type { FsError } from '../../src/errors.ts';
import {
  allocateRange,
  GATE_CLOSED,
  KEEP_SIZE,
  PUNCH_HOLE,
  readRange,
  SEEK_DATA,
  SEEK_HOLE,
  seekRange,
  writeRange,
  ZERO_RANGE,
} from '../../src/tree/byte-range.ts';
import { FakeDisk } from './fake-disk.ts';

const PAGE = 4096;

/** Eight pages; 2 and 3 hold data. The file under test is pages 1 to 6. */
function fixture() {
  const disk = new FakeDisk({ bytes: 8 * PAGE });
  disk.live.write(new Uint8Array(2 * PAGE).fill(7), 0, 2 * PAGE, 2 * PAGE);
  return { disk, contents: disk.live, base: PAGE, length: 6 * PAGE };
}

const errno = (work: () => unknown): string => {
  try {
    work();
    return 'no error';
  } catch (error) {
    return (error as FsError).errno;
  }
};

describe('a byte range', () => {
  it('is read from its own start, short only at its end', () => {
    const { contents, base, length } = fixture();
    const target = new Uint8Array(10);
    expect(readRange(contents, base, length, PAGE - 1, 3, target, 2)).toBe(3);
    expect([...target]).toEqual([0, 0, 0, 7, 7, 0, 0, 0, 0, 0]);
    expect(readRange(contents, base, length, 6 * PAGE - 4, 10, target, 0)).toBe(4);
    expect(readRange(contents, base, length, 6 * PAGE, 10, target, 0)).toBe(0);
    expect(readRange(contents, base, length, 2 ** 60, 10, target, 0)).toBe(0);
  });

  it('takes of a write what fits, and nothing at its end: ENOSPC', () => {
    const { contents, base, length } = fixture();
    const source = new Uint8Array(10).fill(1);
    expect(writeRange(contents, base, length, 6 * PAGE - 4, 10, source, 0)).toBe(4);
    expect(contents.nextData(7 * PAGE)).toBe(-1);
    expect(errno(() => writeRange(contents, base, length, 6 * PAGE, 1, source, 0))).toBe('ENOSPC');
    expect(writeRange(contents, base, length, 6 * PAGE, 0, source, 0)).toBe(0);
  });

  it('ends where the disk ends after it has shrunk', () => {
    const { contents, base, length } = fixture();
    contents.bytes = 2 * PAGE;
    expect(readRange(contents, base, length, 0, 3 * PAGE, new Uint8Array(3 * PAGE), 0)).toBe(PAGE);
    contents.bytes = 0;
    expect(readRange(contents, base, length, 0, 1, new Uint8Array(1), 0)).toBe(0);
  });

  it.each([
    ['data from a hole: where it starts', 0, SEEK_DATA, PAGE],
    ['data from data: there', PAGE + 5, SEEK_DATA, PAGE + 5],
    ['hole from a hole: there', 10, SEEK_HOLE, 10],
    ['hole from data: where it ends', PAGE, SEEK_HOLE, 3 * PAGE],
  ])('seeks %s', (_rule, offset, whence, found) => {
    const { contents, base, length } = fixture();
    expect(seekRange(contents, base, length, offset, whence)).toBe(found);
  });

  it('finds no data and no hole beyond its end', () => {
    const { contents, base } = fixture();
    expect(errno(() => seekRange(contents, base, 6 * PAGE, 3 * PAGE, SEEK_DATA))).toBe('ENXIO');
    expect(errno(() => seekRange(contents, base, 6 * PAGE, 6 * PAGE, SEEK_HOLE))).toBe('ENXIO');
    expect(errno(() => seekRange(contents, base, PAGE, 0, SEEK_DATA))).toBe('ENXIO');
    expect(seekRange(contents, base, 2 * PAGE, PAGE, SEEK_HOLE)).toBe(2 * PAGE);
  });

  it.each([
    ['punching discards', PUNCH_HOLE | KEEP_SIZE, PAGE, PAGE, 'no error', 1],
    ['punching past the end is cut there', PUNCH_HOLE | KEEP_SIZE, PAGE, 2 ** 40, 'no error', 0],
    ['zeroing zeroes', ZERO_RANGE, PAGE, PAGE, 'no error', 2],
    ['zeroing that keeps the size is cut at the end', ZERO_RANGE | KEEP_SIZE, 6 * PAGE, PAGE, 'no error', 2],
    ['zeroing past the end would grow the file', ZERO_RANGE, 5 * PAGE, 2 * PAGE, 'ENOTSUP', 2],
    ['reserving inside the file is granted', 0, PAGE, PAGE, 'no error', 2],
    ['reserving inside the file is granted, size kept', KEEP_SIZE, PAGE, PAGE, 'no error', 2],
    ['reserving past the end is not', 0, 6 * PAGE, 1, 'ENOTSUP', 2],
    ['collapsing a range is not', 0x08, PAGE, PAGE, 'ENOTSUP', 2],
  ])('fallocate: %s', (_rule, mode, offset, bytes, expected, pages) => {
    const { contents, base, length } = fixture();
    expect(errno(() => allocateRange(contents, base, length, offset, bytes, mode))).toBe(expected);
    expect(contents.pages.size).toBe(pages);
  });

  it('says so where the gate is closed, and changes nothing', () => {
    const { disk, contents, base, length } = fixture();
    disk.gateClosed = true;
    expect(writeRange(contents, base, length, PAGE, 4, new Uint8Array(4), 0)).toBe(GATE_CLOSED);
    expect(allocateRange(contents, base, length, PAGE, 4, PUNCH_HOLE | KEEP_SIZE)).toBe(GATE_CLOSED);
    expect(allocateRange(contents, base, length, PAGE, 4, ZERO_RANGE)).toBe(GATE_CLOSED);
    expect(contents.pages.get(2)?.[0]).toBe(7);
  });
});
