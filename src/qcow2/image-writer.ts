/**
 * A new image written from front to back, in the order of the guest's bytes, each table behind what it maps: header
 * cluster (last), then data and L2 tables as they come, at the end the L1 table, the refcount blocks and their table.
 * Far quicker than the engine for an image that nobody else sees yet: nothing is read back, nothing is written twice.
 */
import { FsError } from '../errors.ts';
import type { Storage } from '../storage/storage.ts';
import { newHeaderCluster, roundedSize } from './create.ts';
import { type CompressionType, l1EntriesFor, limits } from './header.ts';
import type { HeaderExtension } from './header-extensions.ts';
import { ALL_ZEROES, COMPRESSED, COPIED } from './l2-entry.ts';
import { setRefcount } from './refcount-entry.ts';
import { highHalf, lowHalf } from './units.ts';

export interface NewImageOptions {
  /** Virtual size in bytes; rounded up to 512. */
  readonly size: number;
  readonly clusterBytes: number;
  /** Of the compressed clusters that will be added. */
  readonly compressionType?: CompressionType;
  /** `file` as it is to be recorded: relative to the image's directory. */
  readonly backing?: { readonly file: string; readonly format: 'qcow2' | 'raw' };
  /** To be kept in the header, behind the usual ones. */
  readonly extensions?: readonly HeaderExtension[];
}

const REFCOUNT_ORDER = 4;
const SECTOR_BYTES = 512;
/** Entries of the list of refcounts at first. */
const FIRST_COUNTS = 1024;

/** Until `finish` has returned, the file is no qcow2 image. */
export class ImageWriter {
  readonly clusterBytes: number;
  readonly #storage: Storage;
  readonly #options: NewImageOptions;
  readonly #size: number;
  readonly #l1: Uint8Array;
  readonly #l2: Uint8Array;
  readonly #l2View: DataView;
  /** Entry of the L1 table that `#l2` is for; -1: none yet. */
  #l1Index = -1;
  #l2Used = false;
  /** First cluster that is not used yet. */
  #end = 1;
  /** References to each cluster in use. */
  #counts = new Uint16Array(FIRST_COUNTS);
  /** Host offset for the next compressed data, and where the room there ends: the end of the cluster it is in. */
  #packAt = 0;
  #packEnd = 0;

  /** @throws FsError EFBIG for a disk that the format cannot map with such clusters */
  constructor(storage: Storage, options: NewImageOptions) {
    const { clusterBytes } = options;
    this.#storage = storage;
    this.#options = options;
    this.#size = roundedSize(options.size);
    this.clusterBytes = clusterBytes;
    const entries = l1EntriesFor(this.#size, { clusterBytes, extendedL2: false });
    if (entries * 8 > limits.L1_BYTES) {
      throw new FsError('EFBIG', `a disk of ${this.#size} bytes is too large for clusters of ${clusterBytes} bytes`);
    }
    this.#l1 = new Uint8Array(entries * 8);
    this.#l2 = new Uint8Array(clusterBytes);
    this.#l2View = new DataView(this.#l2.buffer);
    this.#count(0, 1);
  }

  /**
   * Whole clusters of data from the guest offset `guest` on. Guest offsets must grow from call to call, here and below.
   * @throws FsError ENOSPC, EIO
   */
  data(source: Uint8Array, at: number, length: number, guest: number): void {
    const { clusterBytes } = this;
    const first = this.#take(length / clusterBytes);
    this.#storage.write(source, at, length, first * clusterBytes);
    for (let done = 0; done < length; done += clusterBytes) {
      const host = first * clusterBytes + done;
      this.#map(guest + done, (highHalf(host) | COPIED) >>> 0, lowHalf(host));
    }
  }

  /** One cluster, compressed; `source` is shorter than a cluster. @throws FsError ENOSPC, EIO */
  compressed(source: Uint8Array, guest: number): void {
    const { clusterBytes } = this;
    // The L2 table of the span before goes first, or it would lie in the way of the next cluster.
    this.#turnTo(guest);
    const clusters = Math.ceil((source.length - (this.#packEnd - this.#packAt)) / clusterBytes);
    if (this.#packEnd - this.#packAt < source.length) {
      const adjacent = this.#packEnd === this.#end * clusterBytes;
      if (!adjacent) this.#packAt = this.#end * clusterBytes;
      const wanted = adjacent ? clusters : Math.ceil(source.length / clusterBytes);
      this.#packEnd = (this.#end + wanted) * clusterBytes;
      this.#end += wanted;
    }
    const host = this.#packAt;
    this.#storage.write(source, 0, source.length, host);
    this.#packAt += source.length;
    const last = host + source.length - 1;
    const sectors = Math.floor(last / SECTOR_BYTES) - Math.floor(host / SECTOR_BYTES);
    for (let cluster = Math.floor(host / clusterBytes); cluster <= Math.floor(last / clusterBytes); cluster++) {
      this.#count(cluster, 1);
    }
    // Bit 62 - (cluster_bits - 8) is where the number of additional sectors begins.
    const shift = 62 - (Math.log2(clusterBytes) - 8) - 32;
    this.#map(guest, (highHalf(host) | (sectors << shift) | COMPRESSED) >>> 0, lowHalf(host));
  }

  /** `length` bytes, whole clusters, that read as zeros whatever the backing file has. */
  zeros(length: number, guest: number): void {
    for (let done = 0; done < length; done += this.clusterBytes) this.#map(guest + done, 0, ALL_ZEROES);
  }

  /** The rest of the tables, and the header; durable when it returns. @throws FsError ENOSPC, EIO */
  finish(): void {
    const { clusterBytes } = this;
    this.#writeL2();
    const l1 = this.#take(Math.ceil(this.#l1.length / clusterBytes));
    this.#storage.write(this.#l1, 0, this.#l1.length, l1 * clusterBytes);
    const { table, total } = this.#writeRefcounts();
    this.#storage.truncate(total * clusterBytes);
    const { size, ...formatOptions } = this.#options;
    const header = newHeaderCluster({
      options: { ...formatOptions, size },
      extensions: this.#options.extensions ?? [],
      version: 3,
      size: this.#size,
      clusterBytes,
      refcountOrder: REFCOUNT_ORDER,
      extendedL2: false,
      refcountTable: table,
      l1: { at: l1, entries: this.#l1.length / 8 },
      total,
    });
    this.#storage.flush();
    this.#storage.write(header, 0, header.length, 0);
    this.#storage.flush();
  }

  /** Clusters at the end of the file, each with one reference. */
  #take(count: number): number {
    const first = this.#end;
    this.#end += count;
    this.#count(first, count);
    return first;
  }

  #count(first: number, clusters: number): void {
    if (first + clusters > this.#counts.length) {
      const larger = new Uint16Array(Math.max(first + clusters, this.#counts.length * 2));
      larger.set(this.#counts);
      this.#counts = larger;
    }
    for (let cluster = first; cluster < first + clusters; cluster++) {
      this.#counts[cluster] = (this.#counts[cluster] as number) + 1;
    }
  }

  #map(guest: number, high: number, low: number): void {
    this.#turnTo(guest);
    const at = ((guest / this.clusterBytes) * 8) % this.clusterBytes;
    this.#l2View.setUint32(at, high);
    this.#l2View.setUint32(at + 4, low);
    this.#l2Used = true;
  }

  /** Make `#l2` the table that maps `guest`. */
  #turnTo(guest: number): void {
    const index = Math.floor(guest / (this.clusterBytes * (this.clusterBytes / 8)));
    if (index === this.#l1Index) return;
    this.#writeL2();
    this.#l1Index = index;
  }

  #writeL2(): void {
    if (!this.#l2Used) return;
    const host = this.#take(1) * this.clusterBytes;
    this.#storage.write(this.#l2, 0, this.#l2.length, host);
    const entry = new DataView(this.#l1.buffer, this.#l1Index * 8, 8);
    entry.setUint32(0, (highHalf(host) | COPIED) >>> 0);
    entry.setUint32(4, lowHalf(host));
    this.#l2.fill(0);
    this.#l2Used = false;
  }

  /** Blocks that count everything, themselves and their table too, and the table. */
  #writeRefcounts(): { table: { at: number; count: number }; total: number } {
    const { clusterBytes } = this;
    const perBlock = (clusterBytes * 8) / 2 ** REFCOUNT_ORDER;
    let blocks = 0;
    let tableClusters = 0;
    for (;;) {
      const needed = Math.ceil((this.#end + blocks + tableClusters) / perBlock);
      const neededTable = Math.ceil((needed * 8) / clusterBytes);
      if (needed === blocks && neededTable === tableClusters) break;
      blocks = needed;
      tableClusters = neededTable;
    }
    if (tableClusters * clusterBytes > limits.REFCOUNT_TABLE_BYTES) {
      throw new FsError(
        'EFBIG',
        `an image of ${this.#end * clusterBytes} bytes needs clusters larger than ${clusterBytes}`,
      );
    }
    const firstBlock = this.#take(blocks);
    const table = this.#take(tableClusters);
    const total = this.#end;
    const block = new Uint8Array(clusterBytes);
    const entries = new Uint8Array(tableClusters * clusterBytes);
    const view = new DataView(entries.buffer);
    for (let index = 0; index < blocks; index++) {
      block.fill(0);
      const here = Math.min(perBlock, total - index * perBlock);
      for (let entry = 0; entry < here; entry++) {
        setRefcount(block, entry, REFCOUNT_ORDER, this.#counts[index * perBlock + entry] as number);
      }
      const host = (firstBlock + index) * clusterBytes;
      this.#storage.write(block, 0, clusterBytes, host);
      view.setBigUint64(index * 8, BigInt(host));
    }
    this.#storage.write(entries, 0, entries.length, table * clusterBytes);
    return { table: { at: table, count: tableClusters }, total };
  }
}
