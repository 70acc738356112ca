/** Opening an image: header, tables into shared memory, and what the last session may have left undone. */
import { CorruptImage } from '../errors.ts';
import type { Storage } from '../storage/storage.ts';
import { barrier } from './barrier.ts';
import { markClean } from './first-write.ts';
import { flushIfRoom } from './flush.ts';
import { closeGate } from './gate.ts';
import { geometryOf } from './geometry.ts';
import { type Header, limits } from './header.ts';
import {
  type Backing,
  failure,
  Image,
  type ImageSizes,
  METADATA_MAP_CLUSTERS,
  number,
  type SharedImage,
  word,
} from './image.ts';
import { hostOf } from './l2-entry.ts';
import { refcountTableEntries } from './refcounts.ts';
import { isMarked } from './session-mark.ts';
import type { SnapshotTable } from './snapshot-table.ts';
import { l1EntriesForSize, type SnapshotList } from './snapshots.ts';
import { hex } from './units.ts';

export interface OpenImageOptions {
  readonly file: Storage;
  /** The external data file, if the header names one. */
  readonly data: Storage;
  readonly backing: Backing | undefined;
  readonly header: Header;
  readonly snapshots: SnapshotTable;
  readonly writable: boolean;
  /** Memory for the caches of L2 tables and refcount blocks, in bytes. */
  readonly cacheBytes: number;
}

const MIN_SLOTS = 64;
/** Share of the cache that refcount blocks get. */
const REFCOUNT_SHARE = 1 / 8;

/**
 * @throws CorruptImage if a table is not in the file; FsError EIO
 */
export function openImage(options: OpenImageOptions): { readonly image: Image; readonly shared: SharedImage } {
  const { file, header, writable } = options;
  const geometry = geometryOf({ ...header, writable });
  // Room for every size that the disk may grow to, or roll back to; untouched pages cost nothing.
  const sizes: ImageSizes = {
    l1Capacity: writable ? limits.L1_BYTES / 8 : Math.max(1, header.l1Entries),
    refcountTableCapacity: limits.REFCOUNT_TABLE_BYTES / 8,
    ...slots(options, geometry.sliceBytes, header),
  };
  const shared = Image.create(geometry, sizes);
  const image = Image.attach(shared, file, options.data, options.backing);
  const { numbers, words } = image;
  numbers[number.VIRTUAL_SIZE] = header.size;
  numbers[number.L1_OFFSET] = header.l1TableOffset;
  numbers[number.L1_ENTRIES] = header.l1Entries;
  numbers[number.REFCOUNT_TABLE_OFFSET] = header.refcountTableOffset;
  numbers[number.REFCOUNT_TABLE_CLUSTERS] = header.refcountTableClusters;
  numbers[number.FRESH_FROM] = Math.ceil(file.size() / header.clusterBytes) * header.clusterBytes;
  numbers[number.DATA_CLUSTERS] = -1;
  words[word.EPOCH] = 1;
  if (isMarked(header)) words[word.DIRTY] = 1;
  if (l1EntriesForSize(image, header.size) > header.l1Entries) {
    throw new CorruptImage(
      `${file.path}: the L1 table has ${header.l1Entries} entries, too few for a disk of ${header.size} bytes; the image is damaged`,
    );
  }

  readTable(file, image.l1, header.l1TableOffset, header.l1Entries * 8, 'L1 table');
  if (writable) {
    const bytes = header.refcountTableClusters * header.clusterBytes;
    readTable(file, image.refcountTable, header.refcountTableOffset, bytes, 'refcount table');
    if (!header.corrupt) markMetadata(image, options);
  }
  if (header.corrupt) words[word.FAILED] = failure.CORRUPT;
  return { image, shared };
}

/** As many slots as the tables can fill, within the memory given. */
function slots(
  options: OpenImageOptions,
  sliceBytes: number,
  header: Header,
): { l2Slots: number; refcountSlots: number } {
  const entryBytes = header.extendedL2 ? 16 : 8;
  const l2Bytes = (header.size / header.clusterBytes) * entryBytes + header.clusterBytes;
  const wanted = (bytes: number, limit: number): number =>
    Math.max(MIN_SLOTS, Math.ceil(Math.min(bytes, limit) / sliceBytes));
  return {
    // Changed slices force a flush when they fill a quarter of the cache; in one of four times the tables they never do.
    // 4K random writes that allocate, on 4 GiB: 39 k/s, against 16 k/s in a cache of twice the tables.
    l2Slots: wanted(options.writable ? Math.max(l2Bytes * 4, 2 ** 20) : l2Bytes, options.cacheBytes),
    refcountSlots: wanted(Number.MAX_SAFE_INTEGER, options.cacheBytes * REFCOUNT_SHARE),
  };
}

function readTable(file: Storage, view: DataView, offset: number, bytes: number, what: string): void {
  const target = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  if (bytes > 0 && file.read(target, 0, bytes, offset) < bytes) {
    throw new CorruptImage(
      `${file.path}: the ${what} at ${hex(offset)} passes the end of the file; run vdskfs check on it`,
    );
  }
}

/**
 * Note where metadata is, as far as that can be known without reading L2 tables: header, L1 tables, refcount structures,
 * snapshot table, active L2 tables. Data is never written there.
 * @throws CorruptImage if two of them overlap
 */
function markMetadata(image: Image, options: OpenImageOptions): void {
  const { header, snapshots } = options;
  const { clusterBytes } = image.geometry;
  const mark = (offset: number, bytes: number, what: string): void => {
    if (bytes === 0) return;
    if (offset % clusterBytes !== 0) {
      throw new CorruptImage(`${image.file.path}: the ${what} at ${hex(offset)} does not begin at a cluster`);
    }
    const first = offset / clusterBytes;
    const count = Math.ceil(bytes / clusterBytes);
    // No further than the map goes: tens of thousands of snapshots may each claim the largest of tables.
    const end = Math.min(first + count, METADATA_MAP_CLUSTERS);
    for (let cluster = first; cluster < end; cluster++) {
      if (image.isMetadata(cluster)) {
        throw new CorruptImage(
          `${image.file.path}: the ${what} at ${hex(offset)} overlaps other metadata; run vdskfs check on it`,
        );
      }
    }
    image.setMetadata(first, count, true);
  };
  mark(0, clusterBytes, 'header');
  mark(header.l1TableOffset, header.l1Entries * 8, 'L1 table');
  mark(header.refcountTableOffset, header.refcountTableClusters * clusterBytes, 'refcount table');
  mark(header.snapshotsOffset, snapshots.bytes, 'snapshot table');
  for (let index = 0; index < refcountTableEntries(image); index++) {
    const block = Number(image.refcountTable.getBigUint64(index * 8));
    if (block !== 0) mark(block, clusterBytes, `refcount block ${index}`);
  }
  for (let index = 0; index < header.l1Entries; index++) {
    const table = hostOf(image.l1.getUint32(index * 8), image.l1.getUint32(index * 8 + 4));
    if (table !== 0) mark(table, clusterBytes, `L2 table ${index}`);
  }
  for (const entry of snapshots.entries) {
    if (entry.problem === undefined) mark(entry.l1TableOffset, entry.l1Entries * 8, `L1 table of snapshot ${entry.id}`);
  }
}

/** The list that `takeSnapshot` and the others work on. */
export const snapshotList = (header: Header, table: SnapshotTable): SnapshotList => ({
  entries: table.entries,
  tableOffset: header.snapshotsOffset,
  tableBytes: table.bytes,
});

/**
 * End of a session that wrote: everything in the file, the file a whole number of clusters, the dirty bit cleared.
 * @throws FsError ENOSPC, EIO: the dirty bit stays, and the next opener counts the refcounts anew
 */
export function closeImage(image: Image): void {
  if (!image.geometry.writable || Atomics.load(image.words, word.FAILED) !== failure.NONE) return;
  closeGate(image);
  flushIfRoom(image);
  barrier(image);
  const { clusterBytes } = image.geometry;
  const size = image.file.size();
  // A last cluster that was written in part: the format counts in whole ones.
  if (image.words[word.DIRTY] === 1 && size % clusterBytes !== 0) {
    image.file.truncate(Math.ceil(size / clusterBytes) * clusterBytes);
  }
  if (Atomics.load(image.words, word.COUNTS_TOO_HIGH) === 0) markClean(image);
}
