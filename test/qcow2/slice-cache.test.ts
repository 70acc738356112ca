import { describe, expect, it } from 'vitest';
import { CorruptImage } from '../../src/errors.ts';
import { cacheBytes, SliceCache } from '../../src/qcow2/slice-cache.ts';
import { MemoryStorage } from '../storage/memory-storage.ts';
import { Recorder } from '../storage/recorder.ts';

const SLICE = 512;
const SLOTS = 4;

/** A file whose slice number n is full of n. */
function storageOf(slices: number): Recorder {
  return new Recorder(MemoryStorage.from(new Uint8Array(slices * SLICE).map((_, at) => Math.floor(at / SLICE))));
}

function cacheOver(storage: Recorder, mayWriteAnyTime: boolean): SliceCache {
  const memory = new SharedArrayBuffer(cacheBytes(SLOTS, SLICE));
  const content = mayWriteAnyTime ? 'refcount block' : 'L2 table';
  return new SliceCache({ memory, byteOffset: 0, slots: SLOTS, sliceBytes: SLICE, content, mayWriteAnyTime }, storage);
}

/** First byte of a slice, by way of the cache. */
const look = (cache: SliceCache, slice: number): number => cache.bytes[cache.load(slice * SLICE)] as number;

function change(cache: SliceCache, slice: number, byte: number): void {
  const at = cache.load(slice * SLICE);
  cache.bytes.fill(byte, at, at + SLICE);
  cache.markDirty(at);
}

function inFile(storage: Recorder, slice: number): number {
  const byte = new Uint8Array(1);
  storage.read(byte, 0, 1, slice * SLICE);
  return byte[0] as number;
}

describe('the slice cache', () => {
  it('finds each slice, more of them than it has slots', () => {
    const cache = cacheOver(storageOf(40), false);
    for (const slice of [1, 2, 3, 4, 5, 39, 1, 20, 2, 39]) expect(look(cache, slice)).toBe(slice);
  });

  it('keeps what was used again over what was not', () => {
    const storage = storageOf(40);
    const cache = cacheOver(storage, false);
    for (const slice of [1, 2, 3, 4]) look(cache, slice);
    // The clock has passed once and found all of them used; then only the first is again.
    look(cache, 5);
    look(cache, 2);
    look(cache, 6);
    storage.fail({ at: 0, how: 'EIO', of: 'reads', times: Number.POSITIVE_INFINITY });
    expect(look(cache, 2)).toBe(2);
  });

  it('refuses a slice behind the end of the file, and works on', () => {
    const cache = cacheOver(storageOf(10), false);
    expect(() => cache.load(10 * SLICE)).toThrow(CorruptImage);
    expect(() => cache.load(10 * SLICE)).toThrow(/L2 table at 0x1400 lies past the end/);
    expect(look(cache, 9)).toBe(9);
  });

  it('forgets a slice that could not be read', () => {
    const storage = storageOf(10);
    const cache = cacheOver(storage, false);
    storage.fail({ at: 0, how: 'EIO', of: 'reads' });
    expect(() => cache.load(SLICE)).toThrow(expect.objectContaining({ errno: 'EIO' }));
    expect(look(cache, 1)).toBe(1);
  });
});

describe('changed slices of L2 tables', () => {
  it('stay until a flush stages them, and are not read from the file before it says so', () => {
    const storage = storageOf(40);
    const cache = cacheOver(storage, false);
    change(cache, 1, 101);
    change(cache, 2, 102);
    for (const slice of [3, 4, 5, 6, 7, 8]) look(cache, slice);
    expect(inFile(storage, 1)).toBe(1);
    expect(look(cache, 1)).toBe(101);

    const offsets: number[] = [];
    const staged = cache.stage(offsets);
    expect(offsets).toEqual([1 * SLICE, 2 * SLICE]);
    expect([staged[0], staged[SLICE]]).toEqual([101, 102]);
    expect([cache.dirtyCount(), cache.unevictable()]).toEqual([0, 2]);
    for (const slice of [9, 10, 11, 12, 13, 14]) look(cache, slice);
    expect(look(cache, 2)).toBe(102);

    cache.written(offsets);
    expect(cache.unevictable()).toBe(0);
  });

  it('changed again while on their way are staged again', () => {
    const cache = cacheOver(storageOf(40), false);
    change(cache, 1, 101);
    const first: number[] = [];
    cache.stage(first);
    change(cache, 1, 111);
    cache.written(first);
    const second: number[] = [];
    expect(cache.stage(second)[0]).toBe(111);
    expect(second).toEqual([SLICE]);
  });

  it('that could not be written are changed ones again, with what was changed meanwhile', () => {
    const cache = cacheOver(storageOf(40), false);
    change(cache, 1, 101);
    change(cache, 2, 102);
    const first: number[] = [];
    cache.stage(first);
    change(cache, 2, 112);
    cache.unstage(first);
    expect([cache.dirtyCount(), cache.unevictable()]).toEqual([2, 2]);
    const second: number[] = [];
    const staged = cache.stage(second);
    expect(second.map((offset, index) => [offset / SLICE, staged[index * SLICE]]).sort()).toEqual([
      [1, 101],
      [2, 112],
    ]);
  });

  it('that fill the cache leave no room: a bug, not the image', () => {
    const cache = cacheOver(storageOf(40), false);
    for (const slice of [1, 2, 3, 4]) change(cache, slice, 200);
    expect(() => cache.load(5 * SLICE)).toThrow(/no clean slot/);
  });

  it('are lost on purpose when their space gets another use', () => {
    const storage = storageOf(40);
    const cache = cacheOver(storage, false);
    change(cache, 3, 103);
    cache.drop(2 * SLICE, 5 * SLICE);
    expect(cache.dirtyCount()).toBe(0);
    expect(look(cache, 3)).toBe(3);
  });

  it('forbid to forget everything', () => {
    const cache = cacheOver(storageOf(40), false);
    change(cache, 1, 101);
    expect(() => cache.dropAll()).toThrow(/changed slices/);
    const offsets: number[] = [];
    cache.stage(offsets);
    cache.written(offsets);
    cache.dropAll();
    expect(look(cache, 1)).toBe(1);
  });
});

describe('changed slices of refcount blocks', () => {
  it('make room by going to the file', () => {
    const storage = storageOf(40);
    const cache = cacheOver(storage, true);
    change(cache, 1, 101);
    for (const slice of [2, 3, 4, 5, 6, 7, 8, 9]) look(cache, slice);
    expect(inFile(storage, 1)).toBe(101);
    expect(cache.dirtyCount()).toBe(0);
    expect(look(cache, 1)).toBe(101);
  });

  it('that cannot be written stay changed', () => {
    const storage = storageOf(40);
    const cache = cacheOver(storage, true);
    for (const slice of [1, 2, 3, 4]) change(cache, slice, 200 + slice);
    storage.fail({ at: 0, how: 'ENOSPC' });
    expect(() => cache.load(5 * SLICE)).toThrow(expect.objectContaining({ errno: 'ENOSPC' }));
    expect(cache.dirtyCount()).toBe(4);
    for (const slice of [1, 2, 3, 4]) expect(look(cache, slice)).toBe(200 + slice);
    expect(look(cache, 5)).toBe(5);
  });

  it('are in the file after writeDirty as far as there is room, and go on changed where there is none', () => {
    const storage = storageOf(40);
    const cache = cacheOver(storage, true);
    for (const slice of [1, 2, 3]) change(cache, slice, 100 + slice);
    storage.fail({ at: 1, how: 'ENOSPC' });
    expect(() => cache.writeDirty()).toThrow('ENOSPC');
    expect(cache.dirtyCount()).toBe(2);
    cache.drop(2 * SLICE, 3 * SLICE);
    cache.writeDirty();
    expect([1, 2, 3].map((slice) => inFile(storage, slice))).toEqual([101, 2, 103]);
  });

  it('are all in the file after writeDirty', () => {
    const storage = storageOf(40);
    const cache = cacheOver(storage, true);
    change(cache, 1, 101);
    change(cache, 3, 103);
    cache.writeDirty();
    expect([inFile(storage, 1), inFile(storage, 3), cache.dirtyCount()]).toEqual([101, 103, 0]);
  });
});
