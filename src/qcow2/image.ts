/**
 * One thread's object over an open image. All that changes lives in one SharedArrayBuffer, laid out here once;
 * `lookup`, `allocator`, `write`, `flush` and the others are functions over it. Numbers are exact integers below 2^53.
 */
import { CorruptImage, FsError } from '../errors.ts';
import type { Storage } from '../storage/storage.ts';
import type { FrozenTables } from './frozen-layer.ts';
import type { Geometry } from './geometry.ts';
import type { Kind } from './l2-entry.ts';
import { kind } from './l2-entry.ts';
import { lock, unlock } from './mutex.ts';
import { cacheBytes, SliceCache } from './slice-cache.ts';
import type { HostOffset } from './units.ts';
import { hex } from './units.ts';

/** Threads that can use one image at a time. */
export const MAX_THREADS = 64;

/** Words that all threads of one image share, indexes into `Image.words`. */
export const word = {
  /** Guards everything here but the atomics below. Held for metadata only, never while data is read or written. */
  MUTEX: 0,
  /** How many keep the gate closed; above 0: no new writes. Changed under MUTEX. */
  GATE: 1,
  /** Writes running. Changed under MUTEX; whoever closes the gate waits for 0. */
  WRITERS: 2,
  /** Counts up whenever a write leaves the in-flight table. */
  IN_FLIGHT_CHANGES: 3,
  /** Generation of the mapping: counts up when clusters that were unlinked before get on their way to be freed. */
  EPOCH: 4,
  /** Slots handed out in ACTIVE and the in-flight table. */
  THREADS: 5,
  /** Serialises flushes and everything else that writes metadata to the file. Taken before MUTEX. */
  FLUSH_MUTEX: 6,
  /** Flushes that have captured their state. */
  FLUSH_COUNT: 7,
  /** 1 while a flush has captured changes that are not in the file yet. */
  FLUSHING: 8,
  /** L1 entries [FROM, TO) differ from the file; FROM === TO: none. */
  L1_DIRTY_FROM: 9,
  L1_DIRTY_TO: 10,
  /** See `failure`. */
  FAILED: 11,
  /** 1: autoclear bits are dealt with; the first write of any kind does that. */
  WRITTEN: 12,
  /** 1: the header in the file has the dirty bit; set, durably, before the first change of metadata (version 3). */
  DIRTY: 13,
  /** Ranges in the list of unlinked clusters. */
  UNLINKED_COUNT: 14,
  /** 1: the mark of the session stays at its end; see `countsTooHigh`. */
  COUNTS_TOO_HIGH: 15,
  /** 1: zeros hide what is below also behind the backing file's end; see `keepHidden`. */
  KEEP_HIDDEN: 16,
  /** log2 of the bytes that a bit of the map of written parts stands for; 0: no map is kept (written-map.ts). */
  WRITTEN_SHIFT: 17,
  /** Counts up before compressed data comes to lie where other compressed data may have been. */
  COMPRESSED_CHANGES: 18,
  /** From here on, a word per thread: the EPOCH in which its running operation began, 0 if none runs. */
  ACTIVE: 64,
  COUNT: 64 + MAX_THREADS,
} as const;

/** Large numbers that all threads share, indexes into `Image.numbers`; guarded by MUTEX. */
export const number = {
  /** Bytes of the disk. */
  VIRTUAL_SIZE: 0,
  L1_OFFSET: 1,
  L1_ENTRIES: 2,
  REFCOUNT_TABLE_OFFSET: 3,
  REFCOUNT_TABLE_CLUSTERS: 4,
  /** No cluster below this one is free. */
  FREE_HINT: 5,
  /** Host bytes from here on have never been written: they read as zeros. */
  FRESH_FROM: 6,
  /** Clusters of the live disk with data of their own; -1: not counted yet. */
  DATA_CLUSTERS: 7,
  COUNT: 8,
} as const;

/** Values of the word FAILED. */
export const failure = {
  NONE: 0,
  /** The image contradicts itself: the corrupt bit is set, nothing is written any more. */
  CORRUPT: 1,
  /** A flush failed: what the file holds now is not known, so that nothing is written any more. */
  FLUSH: 2,
} as const;

/** Ranges of unlinked clusters that wait for a flush. More make the writer flush first. */
export const UNLINKED_CAPACITY = 16384;

/** Bits of the map of written parts: one for each cluster of 512 GiB with 64 KiB clusters. */
export const WRITTEN_BITS = 2 ** 23;

/** Bits of the metadata map: clusters above are not covered (16 TiB with 64 KiB clusters). */
export const METADATA_MAP_CLUSTERS = 2 ** 28;

export interface ImageSizes {
  readonly l1Capacity: number;
  /** Entries. */
  readonly refcountTableCapacity: number;
  readonly l2Slots: number;
  readonly refcountSlots: number;
}

/** What other threads need to use the image: plain data, structured-clonable. */
export interface SharedImage {
  readonly geometry: Geometry;
  readonly sizes: ImageSizes;
  readonly memory: SharedArrayBuffer;
}

/** Where a run of guest bytes is; one object per thread, filled by `lookup`. */
export interface Extent {
  kind: Kind;
  /** DATA: host offset of the first byte. */
  host: number;
  /** Bytes, at least 1. */
  length: number;
  /** COMPRESSED: the descriptor's halves. */
  high: number;
  low: number;
}

/** What a read finds where the image has nothing of its own: the next image of the chain. Sizes in bytes. */
export interface Backing {
  size(): number;
  /** Fills all of `target[at, at + length)`; the range lies inside `size()`. */
  read(target: Uint8Array, at: number, length: number, offset: number): void;
  /** Whether the range at `offset` holds data, and for how many bytes (at least 1, at most `length`) that holds. */
  extentAt(offset: number, length: number): { readonly data: boolean; readonly length: number };
}

const ROUND = 4096;
const roundUp = (bytes: number): number => Math.ceil(bytes / ROUND) * ROUND;

/** Offsets of the parts in the shared memory, in bytes. Pages that nobody touches cost no memory. */
function layout(geometry: Geometry, sizes: ImageSizes) {
  let end = 0;
  const part = (bytes: number): number => {
    const at = end;
    end += roundUp(bytes);
    return at;
  };
  const writable = geometry.writable;
  return {
    words: part(word.COUNT * 4),
    numbers: part(number.COUNT * 8),
    inFlight: part(MAX_THREADS * 16),
    unlinked: part(writable ? UNLINKED_CAPACITY * 16 : 0),
    l1: part(sizes.l1Capacity * 8),
    refcountTable: part(writable ? sizes.refcountTableCapacity * 8 : 0),
    toShare: part(writable ? sizes.l1Capacity / 8 : 0),
    metadataMap: part(writable ? METADATA_MAP_CLUSTERS / 8 : 0),
    writtenMap: part(writable ? WRITTEN_BITS / 8 : 0),
    l2: part(cacheBytes(sizes.l2Slots, geometry.sliceBytes)),
    refcounts: part(writable ? cacheBytes(sizes.refcountSlots, geometry.sliceBytes) : 0),
    bytes: end,
  };
}

/** What a reader needs of an image that does not change any more: no caches, no slot of a thread. */
export function frozenTables({ geometry, sizes, memory }: SharedImage): FrozenTables {
  const at = layout(geometry, sizes);
  const numbers = new Float64Array(memory, at.numbers, number.COUNT);
  return {
    geometry,
    size: numbers[number.VIRTUAL_SIZE] as number,
    l1: new DataView(memory, at.l1, sizes.l1Capacity * 8),
    l1Entries: numbers[number.L1_ENTRIES] as number,
  };
}

export class Image {
  readonly geometry: Geometry;
  readonly words: Int32Array;
  readonly numbers: Float64Array;
  /** Per thread: guest bytes [start, end) of the clusters that its write is about to link; end 0: none. */
  readonly inFlight: Float64Array;
  /** Pairs (first host cluster, count): unlinked, refcounts not yet lowered. */
  readonly unlinked: Float64Array;
  /** The active L1 table as in the file: big endian. */
  readonly l1: DataView;
  readonly refcountTable: DataView;
  /** One bit per L1 entry: a snapshot shares its table, which the refcounts do not tell yet (sharing.ts). */
  readonly toShare: Uint8Array;
  /** One bit per host cluster: the engine's own metadata, never to be written as data. */
  readonly metadataMap: Uint8Array;
  /** See written-map.ts. */
  readonly writtenMap: Int32Array;
  readonly l2: SliceCache;
  readonly refcounts: SliceCache;
  readonly file: Storage;
  /** Where guest data is: `file`, or the external data file. */
  readonly data: Storage;
  /** Set anew when a merge puts another image below this one. */
  backing: Backing | undefined;
  /** This thread's slot in ACTIVE and the in-flight table. */
  readonly thread: number;
  readonly extent: Extent = { kind: kind.UNALLOCATED, host: 0, length: 0, high: 0, low: 0 };
  /** One decompressed cluster, the descriptor it came from, and COMPRESSED_CHANGES before it was read. */
  readonly decompressed: { high: number; low: number; changes: number; bytes: Uint8Array } = {
    high: 0,
    low: 0,
    changes: 0,
    bytes: new Uint8Array(0),
  };
  /** The live mapping was looked through, and has no compressed cluster: no write makes one. Known to the main thread. */
  hasNoCompressed = false;
  /** What waits on this thread until the gate is open. */
  readonly gateWaiters: (() => void)[] = [];
  /** Room for one cluster and more, for copy on write; made when first needed. */
  #scratch: Uint8Array | undefined;

  private constructor(
    shared: SharedImage,
    file: Storage,
    data: Storage,
    backing: Backing | undefined,
    thread: number | undefined,
  ) {
    const { geometry, memory, sizes } = shared;
    const at = layout(geometry, sizes);
    this.geometry = geometry;
    this.words = new Int32Array(memory, at.words, word.COUNT);
    this.numbers = new Float64Array(memory, at.numbers, number.COUNT);
    this.inFlight = new Float64Array(memory, at.inFlight, MAX_THREADS * 2);
    this.unlinked = new Float64Array(memory, at.unlinked, geometry.writable ? UNLINKED_CAPACITY * 2 : 0);
    this.l1 = new DataView(memory, at.l1, sizes.l1Capacity * 8);
    this.refcountTable = new DataView(
      memory,
      at.refcountTable,
      geometry.writable ? sizes.refcountTableCapacity * 8 : 0,
    );
    this.toShare = new Uint8Array(memory, at.toShare, geometry.writable ? sizes.l1Capacity / 8 : 0);
    this.metadataMap = new Uint8Array(memory, at.metadataMap, geometry.writable ? METADATA_MAP_CLUSTERS / 8 : 0);
    this.writtenMap = new Int32Array(memory, at.writtenMap, geometry.writable ? WRITTEN_BITS / 32 : 0);
    const { sliceBytes } = geometry;
    this.l2 = new SliceCache(
      { memory, byteOffset: at.l2, slots: sizes.l2Slots, sliceBytes, content: 'L2 table', mayWriteAnyTime: false },
      file,
    );
    this.refcounts = geometry.writable
      ? new SliceCache(
          {
            memory,
            byteOffset: at.refcounts,
            slots: sizes.refcountSlots,
            sliceBytes,
            content: 'refcount block',
            mayWriteAnyTime: true,
          },
          file,
        )
      : this.l2;
    this.file = file;
    this.data = data;
    this.backing = backing;
    this.thread = thread ?? Atomics.add(this.words, word.THREADS, 1);
    if (this.thread >= MAX_THREADS) throw new Error(`more than ${MAX_THREADS} threads on ${file.path}`);
  }

  /** Fresh shared memory; the opener fills in the tables and numbers. */
  static create(geometry: Geometry, sizes: ImageSizes): SharedImage {
    return { geometry, sizes, memory: new SharedArrayBuffer(layout(geometry, sizes).bytes) };
  }

  /**
   * This thread's object over the shared memory. The storages must be open on the same files.
   * @param thread the slot of an earlier object of this thread over the same memory, which is used no more
   */
  static attach(
    shared: SharedImage,
    file: Storage,
    data: Storage,
    backing: Backing | undefined,
    thread?: number,
  ): Image {
    return new Image(shared, file, data, backing, thread);
  }

  get scratch(): Uint8Array {
    this.#scratch ??= new Uint8Array(this.geometry.clusterBytes * 2);
    return this.#scratch;
  }

  virtualSize(): number {
    return this.numbers[number.VIRTUAL_SIZE] as number;
  }

  lock(): void {
    lock(this.words, word.MUTEX);
  }

  unlock(): void {
    unlock(this.words, word.MUTEX);
  }

  /** @throws FsError once the image has failed: nothing is written any more */
  checkUsable(): void {
    switch (Atomics.load(this.words, word.FAILED)) {
      case failure.NONE:
        return;
      case failure.CORRUPT:
        throw new FsError(
          'EIO',
          `${this.file.path} is corrupt and not written any more; unmount it and run vdskfs check`,
        );
      default:
        throw new FsError(
          'EIO',
          `a flush of ${this.file.path} failed, it is not written any more; mend the host's disk, then mount it again`,
        );
    }
  }

  /** The image contradicts itself: nothing is written from now on. Returns the error to throw. */
  fail(what: string): CorruptImage {
    Atomics.compareExchange(this.words, word.FAILED, failure.NONE, failure.CORRUPT);
    return new CorruptImage(`${this.file.path}: ${what}; it is not written any more, run vdskfs check on it`);
  }

  /** Whether a host cluster holds metadata. With the mutex held. */
  isMetadata(cluster: number): boolean {
    if (cluster >= METADATA_MAP_CLUSTERS) return false;
    return ((this.metadataMap[Math.floor(cluster / 8)] as number) & (1 << (cluster % 8))) !== 0;
  }

  /** With the mutex held. */
  setMetadata(firstCluster: number, count: number, isMetadata: boolean): void {
    const end = Math.min(firstCluster + count, METADATA_MAP_CLUSTERS);
    for (let cluster = firstCluster; cluster < end; cluster++) {
      const at = Math.floor(cluster / 8);
      const bit = 1 << (cluster % 8);
      const byte = this.metadataMap[at] as number;
      this.metadataMap[at] = isMetadata ? byte | bit : byte & ~bit;
    }
  }

  /**
   * Refuse to write guest data over metadata: the last line of defence against a lying table. With the mutex held.
   * @throws CorruptImage
   */
  checkNoOverlap(host: number, length: number): void {
    if (this.geometry.externalData) return;
    const first = Math.floor(host / this.geometry.clusterBytes);
    const last = Math.floor((host + length - 1) / this.geometry.clusterBytes);
    for (let cluster = first; cluster <= last; cluster++) {
      if (this.isMetadata(cluster)) throw this.fail(`guest data maps to ${hex(host)}, where metadata is`);
    }
  }

  /** Entry `index` of the active L1 table was changed. With the mutex held. */
  markL1Dirty(index: number): void {
    const { words } = this;
    const from = words[word.L1_DIRTY_FROM] as number;
    const to = words[word.L1_DIRTY_TO] as number;
    words[word.L1_DIRTY_FROM] = from === to ? index : Math.min(from, index);
    words[word.L1_DIRTY_TO] = from === to ? index + 1 : Math.max(to, index + 1);
  }

  /** An operation that uses the mapping outside the mutex begins: clusters it may see are not reused until it ends. */
  enter(): boolean {
    const index = word.ACTIVE + this.thread;
    if (this.words[index] !== 0) return false;
    Atomics.store(this.words, index, Atomics.load(this.words, word.EPOCH));
    return true;
  }

  /** @param entered what the matching `enter` returned: only the outermost operation leaves */
  leave(entered: boolean): void {
    if (entered) Atomics.store(this.words, word.ACTIVE + this.thread, 0);
  }
}

/** A host offset as the unit type; for offsets that this code computed itself. */
export const asHost = (offset: number): HostOffset => offset as HostOffset;
