import { describe, expect, it } from 'vitest';
import { CorruptImage } from '../../src/errors.ts';
import type { FormatOptions } from '../../src/qcow2/create.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import { type Image, number } from '../../src/qcow2/image.ts';
import { kind } from '../../src/qcow2/l2-entry.ts';
import { l2TableAt, lookup } from '../../src/qcow2/lookup.ts';
import type { MemoryStorage } from '../storage/memory-storage.ts';
import { formatted, openSession } from './model.ts';

const CLUSTER = 4096;
/** 512 entries of 8 bytes. */
const SPAN = 512 * CLUSTER;
const COPIED = 1n << 63n;
const COMPRESSED = 1n << 62n;
/** Places behind everything that a new image has. */
const TABLE = 64 * CLUSTER;
const DATA = 80 * CLUSTER;

function put(storage: MemoryStorage, at: number, value: bigint): void {
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setBigUint64(0, value);
  storage.write(bytes, 0, 8, at);
}

/** An image of three L2 tables' span whose first L1 entry and L2 entries are given. */
function imageOf(entries: readonly bigint[], options: Partial<FormatOptions> = {}): Image {
  const storage = formatted({ size: 3 * SPAN, clusterBytes: CLUSTER, ...options });
  const { l1TableOffset } = readHeader(storage);
  put(storage, l1TableOffset, COPIED | BigInt(TABLE));
  storage.truncate(TABLE + 20 * CLUSTER);
  for (const [index, entry] of entries.entries()) put(storage, TABLE + index * 8, entry);
  return openSession(storage).image;
}

function found(image: Image, guest: number, length: number): [number, number, number] {
  lookup(image, undefined, guest, length);
  return [image.extent.kind, image.extent.length, image.extent.kind === kind.DATA ? image.extent.host : 0];
}

const data = (cluster: number): bigint => COPIED | BigInt(DATA + cluster * CLUSTER);

describe('looking up guest bytes', () => {
  it.each([
    ['adjacent clusters are one run', [data(0), data(1), data(2)], 0, 3 * CLUSTER, [kind.DATA, 3 * CLUSTER, DATA]],
    ['a run is as long as asked for', [data(0), data(1)], 100, 5000, [kind.DATA, 5000, DATA + 100]],
    ['clusters apart are runs of their own', [data(0), data(2)], 10, 5000, [kind.DATA, CLUSTER - 10, DATA + 10]],
    ['COPIED does not end a run', [data(0), data(1) & ~COPIED], 0, 8192, [kind.DATA, 8192, DATA]],
    ['zeros are a run, wherever they are', [1n, data(0) | 1n, 1n, data(1)], 5, 99_999, [kind.ZERO, 3 * CLUSTER - 5, 0]],
    ['unallocated clusters are a run', [0n, 0n, data(0)], 1, 99_999, [kind.UNALLOCATED, 2 * CLUSTER - 1, 0]],
    [
      'a compressed cluster is alone',
      [COMPRESSED | 0x5000n, COMPRESSED | 0x5000n],
      7,
      99_999,
      [kind.COMPRESSED, CLUSTER - 7, 0],
    ],
    ['a run ends with the L2 table', [], SPAN - 10, 100, [kind.UNALLOCATED, 10, 0]],
    [
      'without an L2 table all is unallocated, across spans',
      [],
      SPAN + 5,
      2 * SPAN - 5,
      [kind.UNALLOCATED, 2 * SPAN - 5, 0],
    ],
    ['behind the L1 table all is unallocated', [], 5 * SPAN, 77, [kind.UNALLOCATED, 77, 0]],
  ])('%s', (_rule, entries, guest, length, expected) => {
    expect(found(imageOf(entries), guest, length)).toEqual(expected);
  });

  it('stops before the next L2 table that exists', () => {
    const image = imageOf([]);
    image.l1.setBigUint64(0, 0n);
    image.l1.setBigUint64(16, COPIED | BigInt(TABLE));
    expect(found(image, 100, 3 * SPAN - 100)).toEqual([kind.UNALLOCATED, 2 * SPAN - 100, 0]);
  });

  it('goes by the table it is given, not by the active one', () => {
    const image = imageOf([data(0)]);
    lookup(image, { view: new DataView(new SharedArrayBuffer(8)), entries: 1 }, 0, 100);
    expect(image.extent.kind).toBe(kind.UNALLOCATED);
  });

  it('sees what is in the cache before it is in the file', () => {
    const image = imageOf([data(0)]);
    expect(found(image, 0, 10)[0]).toBe(kind.DATA);
    const at = image.l2.load(TABLE);
    image.l2.view.setBigUint64(at, 1n);
    expect(found(image, 0, 10)[0]).toBe(kind.ZERO);
  });

  it.each([
    ['misaligned', COPIED | BigInt(DATA + 512)],
    ['with reserved bits', COPIED | BigInt(DATA) | 2n],
  ])('an L2 entry that is %s is damage', (_rule, entry) => {
    expect(() => found(imageOf([entry]), 0, 10)).toThrow(CorruptImage);
  });

  it('damage behind the bytes asked for is not looked at', () => {
    expect(found(imageOf([data(0), COPIED | 2n]), 0, CLUSTER)).toEqual([kind.DATA, CLUSTER, DATA]);
  });

  it.each([
    ['misaligned', COPIED | BigInt(TABLE + 512), /not the start of a cluster/],
    ['with reserved bits', COPIED | BigInt(TABLE) | 1n, /reserved bits/],
    ['past 2^53', COPIED | (1n << 54n), /above 2\^53/],
  ])('an L1 entry that is %s is damage', (_rule, entry, message) => {
    const image = imageOf([]);
    image.l1.setBigUint64(0, entry);
    expect(() => l2TableAt(image, undefined, 0)).toThrow(message);
  });

  it('L1 entries behind the number of them do not count', () => {
    const image = imageOf([]);
    image.l1.setBigUint64(24, COPIED | BigInt(TABLE));
    expect(image.numbers[number.L1_ENTRIES]).toBe(3);
    expect(l2TableAt(image, undefined, 3)).toBe(0);
  });
});

describe('looking up subclusters', () => {
  const SUBCLUSTER = 512;
  const extended = (entry: bigint, zero: number, allocated: number): bigint[] => [
    entry,
    (BigInt(zero >>> 0) << 32n) | BigInt(allocated >>> 0),
  ];
  const image = (...entries: bigint[][]): Image =>
    imageOf(entries.flat(), { clusterBytes: 16_384, extendedL2: true, size: 2 ** 24 });

  it.each([
    ['runs change inside of a cluster', 0, [kind.DATA, 2 * SUBCLUSTER, DATA]],
    ['zeros between', 2 * SUBCLUSTER, [kind.ZERO, SUBCLUSTER, 0]],
    [
      'unallocated ones are a run over the end of the cluster',
      3 * SUBCLUSTER + 1,
      [kind.UNALLOCATED, 60 * SUBCLUSTER - 1, 0],
    ],
    [
      'a run goes on in the next cluster',
      16_384 + 31 * SUBCLUSTER,
      [kind.DATA, 2 * SUBCLUSTER, DATA + 2 * 16_384 - 512],
    ],
  ])('%s', (_rule, guest, expected) => {
    const at = COPIED | BigInt(DATA);
    const next = (clusters: number): bigint => COPIED | BigInt(DATA + clusters * 16_384);
    const mapped = image(extended(at, 0b100, 0b11), extended(next(1), 0, 0x8000_0000), extended(next(2), 0, 0b1));
    expect(found(mapped, guest, 99_999)).toEqual(expected);
  });
});
