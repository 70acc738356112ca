import { describe, expect, it } from 'vitest';
import { CorruptImage } from '../../src/errors.ts';
import { allocate, allocateTable, giveBack, giveBackTable, touchFresh } from '../../src/qcow2/allocator.ts';
import type { FormatOptions } from '../../src/qcow2/create.ts';
import { beforeMetadata } from '../../src/qcow2/first-write.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import { type Image, number } from '../../src/qcow2/image.ts';
import { refcountOf, refcountTableEntries } from '../../src/qcow2/refcounts.ts';
import { Recorder } from '../storage/recorder.ts';
import { closeSession, formatted, openSession, qemuCheck } from './model.ts';

/** Clusters of 512 bytes: 256 refcounts to a block, 64 blocks to a table of one cluster. */
const OPTIONS: FormatOptions = { size: 2 ** 20, clusterBytes: 512 };
const PER_BLOCK = 256;

function imageOf(options: FormatOptions = OPTIONS): Image {
  const { image } = openSession(formatted(options));
  beforeMetadata(image);
  return image;
}

/** Take clusters one by one until `last` is taken. */
function fillTo(image: Image, last: number): void {
  for (;;) {
    const { first, count } = allocate(image, 1);
    if (first + count > last) return;
  }
}

describe('allocating clusters', () => {
  it('gives the first free ones, adjacent, each with a refcount of 1', () => {
    const image = imageOf();
    const { first, count } = allocate(image, 5);
    expect(count).toBe(5);
    for (let cluster = 0; cluster < first + 5; cluster++) expect(refcountOf(image, cluster)).toBe(1);
    expect(refcountOf(image, first + 5)).toBe(0);
    expect(allocate(image, 1).first).toBe(first + 5);
  });

  it('gives fewer where a hole is smaller', () => {
    const image = imageOf();
    const { first } = allocate(image, 10);
    giveBack(image, first + 2, 3);
    expect(allocate(image, 8)).toEqual({ first: first + 2, count: 3 });
    expect(allocate(image, 8)).toEqual({ first: first + 10, count: 8 });
  });

  it('reuses what was given back, lowest first', () => {
    const image = imageOf();
    const { first } = allocate(image, 10);
    giveBack(image, first + 7, 1);
    giveBack(image, first + 1, 1);
    expect([allocate(image, 1).first, allocate(image, 1).first]).toEqual([first + 1, first + 7]);
  });

  it('makes a new refcount block at the start of what it counts', () => {
    const image = imageOf();
    fillTo(image, PER_BLOCK);
    expect(refcountOf(image, PER_BLOCK)).toBe(1);
    expect(image.isMetadata(PER_BLOCK)).toBe(true);
    expect(Number(image.refcountTable.getBigUint64(8))).toBe(PER_BLOCK * 512);
  });

  it('moves the refcount table when it is full, and the header names the new one', () => {
    const image = imageOf();
    const before = image.numbers[number.REFCOUNT_TABLE_OFFSET];
    const entries = refcountTableEntries(image);
    fillTo(image, entries * PER_BLOCK);
    expect(refcountTableEntries(image)).toBeGreaterThan(entries);
    const header = readHeader(image.file);
    expect(header.refcountTableOffset).toBe(image.numbers[number.REFCOUNT_TABLE_OFFSET]);
    expect(header.refcountTableOffset).not.toBe(before);
  });

  it('refuses a cluster that holds metadata but is counted as free', () => {
    const image = imageOf();
    const { first } = allocate(image, 1);
    image.setMetadata(first + 1, 1, true);
    expect(() => allocate(image, 1)).toThrow(CorruptImage);
    expect(() => image.checkUsable()).toThrow(/corrupt/);
  });

  it('never gives a cluster back that is free already', () => {
    const image = imageOf();
    const { first } = allocate(image, 1);
    giveBack(image, first, 1);
    expect(() => giveBack(image, first, 1)).toThrow(CorruptImage);
  });
});

describe('allocating tables', () => {
  it('takes adjacent clusters only, and leaves no hole that was too small behind', () => {
    const image = imageOf();
    const { first } = allocate(image, 20);
    giveBack(image, first + 1, 2);
    giveBack(image, first + 5, 3);
    expect(allocateTable(image, 4)).toBe(first + 20);
    expect(allocate(image, 9)).toEqual({ first: first + 1, count: 2 });
    expect(allocate(image, 9)).toEqual({ first: first + 5, count: 3 });
  });

  it('larger than a refcount block counts, behind all blocks', () => {
    const image = imageOf();
    const first = allocateTable(image, 3 * PER_BLOCK);
    for (const cluster of [first, first + PER_BLOCK, first + 3 * PER_BLOCK - 1]) {
      expect(refcountOf(image, cluster)).toBe(1);
      expect(image.isMetadata(cluster)).toBe(true);
    }
    expect(refcountOf(image, first + 3 * PER_BLOCK)).toBe(0);
  });

  it('larger than the refcount table counts', () => {
    const image = imageOf();
    const clusters = refcountTableEntries(image) * PER_BLOCK;
    const first = allocateTable(image, clusters);
    expect([refcountOf(image, first), refcountOf(image, first + clusters - 1)]).toEqual([1, 1]);
  });

  it('given back they are no metadata any more', () => {
    const image = imageOf();
    const first = allocateTable(image, 3);
    giveBackTable(image, first, 3);
    expect([refcountOf(image, first), image.isMetadata(first)]).toEqual([0, false]);
    expect(allocateTable(image, 3)).toBe(first);
  });
});

describe('clusters never written', () => {
  it('are those behind the end that the file has had, once', () => {
    const image = imageOf();
    const { first } = allocate(image, 4);
    expect(touchFresh(image, first, 4)).toBe(true);
    expect(touchFresh(image, first, 4)).toBe(false);
    expect(touchFresh(image, first + 4, 1)).toBe(true);
  });
});

describe('refcount structures that cannot be made', () => {
  const TABLE_END = 64 * PER_BLOCK;

  /** Whether the allocation behind `last` failed at its change number `at`; what follows is as if it had not, or refused. */
  function failsAt(version: 2 | 3, last: number, at: number): boolean {
    const storage = formatted({ ...OPTIONS, version });
    const recorder = new Recorder(storage);
    const session = openSession(recorder);
    const { image } = session;
    beforeMetadata(image);
    const taken: { first: number; count: number }[] = [];
    while ((taken.at(-1)?.first ?? 0) < last) taken.push(allocate(image, 1));
    // The changed counts of the blocks that exist are not what fails here.
    image.refcounts.writeDirty();
    recorder.fail({ at, how: 'ENOSPC' });
    let failed = false;
    try {
      taken.push(allocate(image, 1));
    } catch (error) {
      failed = true;
      expect(error).toMatchObject({ errno: expect.stringMatching(/ENOSPC|EIO/) });
      if ((error as { errno: string }).errno === 'EIO') {
        // A barrier, or the header: nobody writes any more.
        expect(() => image.checkUsable()).toThrow(/not written any more/);
        return true;
      }
      taken.push(allocate(image, 1));
    }
    recorder.fail(undefined);
    for (const { first, count } of taken) giveBack(image, first, count);
    closeSession(session);
    qemuCheck(storage);
    return failed;
  }

  it.each([
    ['a refcount block', 3, PER_BLOCK - 1, 2],
    ['a refcount block, durable before it is referred to', 2, PER_BLOCK - 1, 3],
    ['a larger refcount table', 3, TABLE_END - 1, 5],
  ] as const)(
    '%s: the next allocation makes it, or the image is not written any more',
    (_what, version, last, changes) => {
      let at = 0;
      while (failsAt(version, last, at)) at++;
      expect(at).toBe(changes);
    },
  );
});
