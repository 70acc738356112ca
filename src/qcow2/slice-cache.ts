/**
 * Slices of L2 tables or refcount blocks in shared memory, found by their host offset; replaced by the clock algorithm.
 * Every method is called with the image's mutex held. Changed slices stay until a flush has written them, so that the
 * write order is the flush's and nobody else's.
 */
import { CorruptImage } from '../errors.ts';
import type { Storage } from '../storage/storage.ts';
import { hex } from './units.ts';

/** Indexes into a cache's own words. */
const word = { HAND: 0, DIRTY_COUNT: 1, WRITING_COUNT: 2, COUNT: 3 } as const;

const flag = {
  /** Differs from the file; listed in the dirty list. */
  DIRTY: 1,
  /** Its last content is on the way to the file: must not be read from there yet. */
  WRITING: 2,
  /** Used since the clock's hand passed. */
  RECENT: 4,
} as const;

const buckets = (slots: number): number => 2 ** Math.ceil(Math.log2(slots * 2));

/** Shared memory that a cache of `slots` slices needs, in bytes; a multiple of 8. */
export function cacheBytes(slots: number, sliceBytes: number): number {
  const words = word.COUNT + buckets(slots) + 3 * slots;
  return 8 * slots + 4 * (words + (words % 2)) + slots * sliceBytes;
}

export interface SliceCacheOptions {
  readonly memory: SharedArrayBuffer;
  readonly byteOffset: number;
  readonly slots: number;
  readonly sliceBytes: number;
  /** What the slices are, for messages. */
  readonly content: 'L2 table' | 'refcount block' | 'mapping';
  /**
   * Refcounts may reach the file at any moment (up before the reference, down after it went: whoever changes them sees
   * to that); L2 slices only by a flush, after the data they point to.
   */
  readonly mayWriteAnyTime: boolean;
}

export class SliceCache {
  /** The slices, one after another in slot order. */
  readonly bytes: Uint8Array;
  /** The same memory, for entries. */
  readonly view: DataView;
  readonly slots: number;
  readonly sliceBytes: number;
  readonly #content: string;
  readonly #mayWriteAnyTime: boolean;
  readonly #storage: Pick<Storage, 'path' | 'read' | 'write'>;
  readonly #words: Int32Array;
  /** Host offset of each slot's slice; 0: empty (offset 0 is the header, never a table). */
  readonly #offsets: Float64Array;
  readonly #buckets: Int32Array;
  readonly #next: Int32Array;
  readonly #flags: Int32Array;
  readonly #dirty: Int32Array;
  /** 32 - log2(number of buckets). */
  readonly #hashShift: number;

  constructor(options: SliceCacheOptions, storage: Pick<Storage, 'path' | 'read' | 'write'>) {
    const { memory, slots, sliceBytes } = options;
    this.slots = slots;
    this.sliceBytes = sliceBytes;
    this.#content = options.content;
    this.#mayWriteAnyTime = options.mayWriteAnyTime;
    this.#storage = storage;
    let at = options.byteOffset;
    this.#offsets = new Float64Array(memory, at, slots);
    at += 8 * slots;
    const take = (count: number): Int32Array => {
      const part = new Int32Array(memory, at, count);
      at += 4 * count;
      return part;
    };
    this.#words = take(word.COUNT);
    this.#buckets = take(buckets(slots));
    this.#hashShift = Math.clz32(this.#buckets.length) + 1;
    this.#next = take(slots);
    this.#flags = take(slots);
    this.#dirty = take(slots);
    at += at % 8;
    this.bytes = new Uint8Array(memory, at, slots * sliceBytes);
    this.view = new DataView(memory, at, slots * sliceBytes);
  }

  dirtyCount(): number {
    return this.#words[word.DIRTY_COUNT] as number;
  }

  /** Slices that cannot make room for others: changed, or on the way to the file. */
  unevictable(): number {
    return this.dirtyCount() + (this.#words[word.WRITING_COUNT] as number);
  }

  /**
   * Byte position in `bytes` of the slice at `hostOffset` (a multiple of the slice size), read from the file if needed.
   * Valid until the mutex is released.
   * @throws CorruptImage if it lies past the end of the file
   */
  load(hostOffset: number): number {
    const slot = this.#find(hostOffset);
    if (slot >= 0) {
      this.#flags[slot] = (this.#flags[slot] as number) | flag.RECENT;
      return slot * this.sliceBytes;
    }
    return this.#fill(hostOffset) * this.sliceBytes;
  }

  /** The slice at byte position `position` of `bytes` was changed. */
  markDirty(position: number): void {
    const slot = position / this.sliceBytes;
    const flags = this.#flags[slot] as number;
    if ((flags & flag.DIRTY) !== 0) return;
    this.#flags[slot] = flags | flag.DIRTY;
    const count = this.#words[word.DIRTY_COUNT] as number;
    this.#dirty[count] = slot;
    this.#words[word.DIRTY_COUNT] = count + 1;
  }

  /**
   * Copy all changed slices out for writing and call them clean; until `written()` they are not read from the file.
   * @param offsets receives the host offsets
   * @returns the slices in the order of `offsets`
   */
  stage(offsets: number[]): Uint8Array {
    const count = this.dirtyCount();
    const staged = new Uint8Array(count * this.sliceBytes);
    for (let index = 0; index < count; index++) {
      const slot = this.#dirty[index] as number;
      offsets.push(this.#offsets[slot] as number);
      staged.set(this.#slice(slot), index * this.sliceBytes);
      this.#flags[slot] = ((this.#flags[slot] as number) & ~flag.DIRTY) | flag.WRITING;
    }
    this.#words[word.DIRTY_COUNT] = 0;
    this.#words[word.WRITING_COUNT] = count;
    return staged;
  }

  /** The staged slices have reached the file. */
  written(offsets: readonly number[]): void {
    this.#words[word.WRITING_COUNT] = 0;
    for (const offset of offsets) {
      const slot = this.#find(offset);
      if (slot >= 0) this.#flags[slot] = (this.#flags[slot] as number) & ~flag.WRITING;
    }
  }

  /** The staged slices have not all reached the file: they are changed ones as before. */
  unstage(offsets: readonly number[]): void {
    this.written(offsets);
    for (const offset of offsets) {
      const slot = this.#find(offset);
      if (slot >= 0) this.markDirty(slot * this.sliceBytes);
    }
  }

  /**
   * Write every changed slice to the file now. Only for content that may be written at any time. What cannot be written
   * stays changed.
   */
  writeDirty(): void {
    for (let left = this.dirtyCount(); left > 0; left--) {
      const slot = this.#dirty[left - 1] as number;
      this.#write(slot);
      this.#flags[slot] = (this.#flags[slot] as number) & ~flag.DIRTY;
      this.#words[word.DIRTY_COUNT] = left - 1;
    }
  }

  /** Forget the slices of [from, to): that space gets another use. Changes in them are lost on purpose. */
  drop(from: number, to: number): void {
    for (let offset = from; offset < to; offset += this.sliceBytes) {
      const slot = this.#find(offset);
      if (slot >= 0) this.#evict(slot);
    }
  }

  /** Forget everything: the file was changed behind the cache. Nothing may be dirty. */
  dropAll(): void {
    if (this.dirtyCount() !== 0) throw new Error(`${this.#content} cache emptied with changed slices in it`);
    this.#offsets.fill(0);
    this.#buckets.fill(0);
    this.#flags.fill(0);
  }

  #slice(slot: number): Uint8Array {
    return this.bytes.subarray(slot * this.sliceBytes, (slot + 1) * this.sliceBytes);
  }

  #bucket(hostOffset: number): number {
    // Multiplicative hashing of the slice number's low 32 bits.
    return Math.imul(hostOffset / this.sliceBytes, 0x9e37_79b1) >>> this.#hashShift;
  }

  #find(hostOffset: number): number {
    let link = this.#buckets[this.#bucket(hostOffset)] as number;
    while (link !== 0) {
      const slot = link - 1;
      if (this.#offsets[slot] === hostOffset) return slot;
      link = this.#next[slot] as number;
    }
    return -1;
  }

  #fill(hostOffset: number): number {
    const slot = this.#freeSlot();
    const at = slot * this.sliceBytes;
    const got = this.#storage.read(this.bytes, at, this.sliceBytes, hostOffset);
    if (got < this.sliceBytes) {
      throw new CorruptImage(
        `${this.#storage.path}: the ${this.#content} at ${hex(hostOffset)} lies past the end of the file; run vdskfs check on it`,
      );
    }
    const bucket = this.#bucket(hostOffset);
    this.#offsets[slot] = hostOffset;
    this.#flags[slot] = flag.RECENT;
    this.#next[slot] = this.#buckets[bucket] as number;
    this.#buckets[bucket] = slot + 1;
    return slot;
  }

  #freeSlot(): number {
    // Twice around: the first turn clears the marks, the second finds whoever stayed unused.
    for (let step = 0; step < 2 * this.slots + 1; step++) {
      const slot = this.#words[word.HAND] as number;
      this.#words[word.HAND] = slot + 1 === this.slots ? 0 : slot + 1;
      if (this.#offsets[slot] === 0) return slot;
      const flags = this.#flags[slot] as number;
      if ((flags & flag.WRITING) !== 0) continue;
      if ((flags & flag.RECENT) !== 0) {
        this.#flags[slot] = flags & ~flag.RECENT;
        continue;
      }
      if ((flags & flag.DIRTY) !== 0) {
        if (!this.#mayWriteAnyTime) continue;
        this.#write(slot);
      }
      this.#evict(slot);
      return slot;
    }
    throw new Error(`no clean slot among ${this.slots} in the ${this.#content} cache`);
  }

  #write(slot: number): void {
    this.#storage.write(this.bytes, slot * this.sliceBytes, this.sliceBytes, this.#offsets[slot] as number);
  }

  #evict(slot: number): void {
    if (((this.#flags[slot] as number) & flag.DIRTY) !== 0) {
      const last = (this.#words[word.DIRTY_COUNT] as number) - 1;
      const at = this.#dirty.indexOf(slot);
      this.#dirty[at] = this.#dirty[last] as number;
      this.#words[word.DIRTY_COUNT] = last;
    }
    const bucket = this.#bucket(this.#offsets[slot] as number);
    let link = this.#buckets[bucket] as number;
    if (link - 1 === slot) {
      this.#buckets[bucket] = this.#next[slot] as number;
    } else {
      while ((this.#next[link - 1] as number) - 1 !== slot) link = this.#next[link - 1] as number;
      this.#next[link - 1] = this.#next[slot] as number;
    }
    this.#offsets[slot] = 0;
    this.#flags[slot] = 0;
  }
}
