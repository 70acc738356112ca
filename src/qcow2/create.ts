/** New images, laid out as QEMU lays them out: header, refcount table, refcount blocks, L1 table, L2 tables, data. */
import { unlinkSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { FsError } from '../errors.ts';
import { syncDirectory } from '../storage/directory.ts';
import { HostFile } from '../storage/host-file.ts';
import type { Storage } from '../storage/storage.ts';
import {
  autoclear,
  type CompressionType,
  compatible,
  decodeHeader,
  encodeHeaderCluster,
  HEADER_BYTES_V2,
  headerRecord,
  incompatible,
  l2EntriesOf,
  limits,
  MAGIC,
  readHeader,
} from './header.ts';
import {
  encodeFeatureNames,
  extensionsBytes,
  extensionType,
  type FeatureName,
  type HeaderExtension,
} from './header-extensions.ts';
import { COPIED } from './l2-entry.ts';
import { setRefcount } from './refcount-entry.ts';
import { highHalf, lowHalf } from './units.ts';

export interface FormatOptions {
  /** Virtual size in bytes; rounded up to 512, the unit in which QEMU counts. */
  readonly size: number;
  /** 3 if left out. */
  readonly version?: 2 | 3;
  /** A power of two, 512 to 2 MiB; 64 KiB if left out. */
  readonly clusterBytes?: number;
  /** 1, 2, 4, … 64; 16 if left out. */
  readonly refcountBits?: number;
  readonly extendedL2?: boolean;
  readonly lazyRefcounts?: boolean;
  readonly compressionType?: CompressionType;
  /** `file` as it is to be recorded: relative to the image's directory. */
  readonly backing?: { readonly file: string; readonly format: 'qcow2' | 'raw' };
  /** `raw`: the data file is the plain disk as well; every cluster is mapped then. */
  readonly dataFile?: { readonly file: string; readonly raw?: boolean };
  /** Header extensions besides those that follow from the other options. */
  readonly extensions?: readonly HeaderExtension[];
  /** `metadata`: every cluster has its place from the start. */
  readonly preallocation?: 'off' | 'metadata';
}

export interface CreateOptions extends Omit<FormatOptions, 'size'> {
  /** Left out: as the backing file. */
  readonly size?: number;
}

const SECTOR_BYTES = 512;
const DEFAULT_CLUSTER_BYTES = 65536;
const HEADER_BYTES = headerRecord.bytes;

/** The bits of this program's features, for programs that do not know them. */
const FEATURE_NAMES: readonly FeatureName[] = [
  { kind: 'incompatible', bit: 0, name: 'dirty bit' },
  { kind: 'incompatible', bit: 1, name: 'corrupt bit' },
  { kind: 'incompatible', bit: 2, name: 'external data file' },
  { kind: 'incompatible', bit: 3, name: 'compression type' },
  { kind: 'incompatible', bit: 4, name: 'extended L2 entries' },
  { kind: 'compatible', bit: 0, name: 'lazy refcounts' },
  { kind: 'autoclear', bit: 0, name: 'bitmaps' },
  { kind: 'autoclear', bit: 1, name: 'raw external data' },
];

/**
 * Make the image file at `path`, durably. Until the header is there, as the last write, the file is no qcow2 image;
 * after a failure it is gone.
 * @throws FsError EEXIST if the file (or the data file) exists; ENOENT if the backing file does not; as `formatImage`
 */
export function createImage(path: string, options: CreateOptions): void {
  const complete: FormatOptions = { ...options, size: options.size ?? sizeOfBacking(path, options) };
  // Everything that can be wrong with the options is found before a file is made.
  planImage(complete);
  if (options.backing !== undefined) backingBytes(path, options.backing);
  const made: string[] = [];
  try {
    using image = HostFile.open(path, { readOnly: false, create: 'new' });
    made.push(path);
    if (options.dataFile !== undefined) {
      const dataPath = recordedPath(path, options.dataFile.file);
      using data = HostFile.open(dataPath, { readOnly: false, create: 'new' });
      made.push(dataPath);
      data.truncate(roundedSize(complete.size));
      data.flush();
    }
    formatImage(image, complete);
    for (const folder of new Set(made.map((file) => dirname(resolve(file))))) syncDirectory(folder);
  } catch (error) {
    for (const file of made) unlinkSync(file);
    throw error;
  }
}

/** Where a recorded file name points: names are relative to the image's directory. */
const recordedPath = (imagePath: string, name: string): string =>
  resolve(dirname(imagePath), name.startsWith('file:') ? name.slice('file:'.length) : name);

function sizeOfBacking(path: string, { backing }: CreateOptions): number {
  if (backing === undefined) throw new FsError('EINVAL', `cannot create '${path}': it needs a size or a backing file`);
  return backingBytes(path, backing);
}

function backingBytes(path: string, backing: NonNullable<FormatOptions['backing']>): number {
  using file = HostFile.open(recordedPath(path, backing.file), { readOnly: true });
  return backing.format === 'qcow2' ? readHeader(file).size : file.size();
}

export const roundedSize = (size: number): number => Math.ceil(size / SECTOR_BYTES) * SECTOR_BYTES;

/** Where everything goes. Offsets and counts are in clusters, but for `size`. */
interface Plan {
  readonly options: FormatOptions;
  readonly version: 2 | 3;
  readonly size: number;
  readonly clusterBytes: number;
  readonly refcountOrder: number;
  readonly extendedL2: boolean;
  readonly refcountTable: { readonly at: number; readonly count: number };
  readonly refcountBlocks: { readonly at: number; readonly count: number };
  readonly l1: { readonly at: number; readonly entries: number };
  readonly l2: { readonly at: number; readonly count: number };
  /** Guest clusters that are mapped from the start; at their guest offset in an external data file. */
  readonly data: { readonly at: number; readonly count: number };
  /** Clusters of the image file. */
  readonly total: number;
}

/** @throws FsError EINVAL for options that the format cannot combine, EFBIG for a disk that its tables cannot map */
function planImage(options: FormatOptions): Plan {
  const { version = 3, clusterBytes = DEFAULT_CLUSTER_BYTES, refcountBits = 16, extendedL2 = false } = options;
  const size = checkOptions(options);
  const preallocated = options.preallocation === 'metadata' || options.dataFile?.raw === true;

  const l2Entries = l2EntriesOf({ clusterBytes, extendedL2 });
  const l1Entries = Math.ceil(size / (clusterBytes * l2Entries));
  if (l1Entries * 8 > limits.L1_BYTES) {
    const most = (limits.L1_BYTES / 8) * clusterBytes * l2Entries;
    throw new FsError(
      'EFBIG',
      `a disk of ${size} bytes is too large for clusters of ${clusterBytes} bytes, which map at most ${most}; use larger clusters`,
    );
  }
  const guestClusters = preallocated ? Math.ceil(size / clusterBytes) : 0;
  const l1Clusters = Math.ceil((l1Entries * 8) / clusterBytes);
  const l2Tables = preallocated ? l1Entries : 0;
  const others = 1 + l1Clusters + l2Tables + (options.dataFile === undefined ? guestClusters : 0);

  // Refcount blocks count themselves and their table, so both grow until they cover the whole.
  const perBlock = (clusterBytes * 8) / refcountBits;
  let blocks = 0;
  let table = 0;
  for (;;) {
    const needed = Math.ceil((others + blocks + table) / perBlock);
    const neededTable = Math.ceil((needed * 8) / clusterBytes);
    if (needed === blocks && neededTable === table) break;
    blocks = needed;
    table = neededTable;
  }
  if (table * clusterBytes > limits.REFCOUNT_TABLE_BYTES) {
    throw new FsError(
      'EFBIG',
      `a disk of ${size} bytes needs a refcount table of ${table * clusterBytes} bytes, at most ${limits.REFCOUNT_TABLE_BYTES} can be; use larger clusters or fewer refcount bits`,
    );
  }
  const l1At = 1 + table + blocks;
  const l2At = l1At + l1Clusters;
  return {
    options,
    version,
    size,
    clusterBytes,
    refcountOrder: Math.log2(refcountBits),
    extendedL2,
    refcountTable: { at: 1, count: table },
    refcountBlocks: { at: 1 + table, count: blocks },
    l1: { at: l1At, entries: l1Entries },
    l2: { at: l2At, count: l2Tables },
    data: { at: options.dataFile === undefined ? l2At + l2Tables : 0, count: guestClusters },
    total: others + blocks + table,
  };
}

/** @returns the size in whole sectors */
function checkOptions(options: FormatOptions): number {
  const { size, version = 3, clusterBytes = DEFAULT_CLUSTER_BYTES, refcountBits = 16 } = options;
  const refuse = (rule: string): FsError => new FsError('EINVAL', `cannot make such an image: ${rule}`);
  if (!Number.isSafeInteger(size) || size < 0 || !Number.isSafeInteger(roundedSize(size))) {
    throw refuse(`a disk's size is 0 to 2^53 bytes, not ${size}`);
  }
  const clusterBits = Math.log2(clusterBytes);
  if (
    !Number.isInteger(clusterBits) ||
    clusterBits < limits.MIN_CLUSTER_BITS ||
    clusterBits > limits.MAX_CLUSTER_BITS
  ) {
    throw refuse(`clusters have 512 bytes to 2 MiB, a power of two, not ${clusterBytes}`);
  }
  const order = Math.log2(refcountBits);
  if (!Number.isInteger(order) || order < 0 || order > limits.MAX_REFCOUNT_ORDER) {
    throw refuse(`refcounts have 1, 2, 4, 8, 16, 32 or 64 bits, not ${refcountBits}`);
  }
  if (version === 2) {
    if (refcountBits !== 16) throw refuse('version 2 has refcounts of 16 bits only');
    if (options.extendedL2) throw refuse('extended L2 entries need version 3');
    if (options.lazyRefcounts) throw refuse('lazy refcounts need version 3');
    if ((options.compressionType ?? 'deflate') !== 'deflate') throw refuse('zstd compression needs version 3');
    if (options.dataFile !== undefined) throw refuse('an external data file needs version 3');
  }
  if (options.extendedL2 && clusterBits < limits.MIN_CLUSTER_BITS_EXTENDED_L2) {
    throw refuse(`extended L2 entries need clusters of at least ${2 ** limits.MIN_CLUSTER_BITS_EXTENDED_L2} bytes`);
  }
  if (options.backing !== undefined) {
    if (options.backing.file === '') throw refuse("the backing file's name is empty");
    if (options.dataFile?.raw) throw refuse('a raw external data file cannot go with a backing file');
    // A standard entry that has a place hides the backing file; only subclusters can have one and show it.
    if (options.preallocation === 'metadata' && !options.extendedL2) {
      throw refuse('preallocation with a backing file needs extended L2 entries');
    }
  }
  if (options.dataFile?.file === '') throw refuse("the data file's name is empty");
  return roundedSize(size);
}

/**
 * Write a whole image to an empty `storage` and flush it. The header is the last write, behind a barrier (write order:
 * a table is complete before anything points at it). The data file of `options.dataFile` is the caller's.
 * @throws FsError EINVAL for options that the format cannot combine, EFBIG for a disk that its tables cannot map
 */
export function formatImage(storage: Storage, options: FormatOptions): void {
  const plan = planImage(options);
  const header = newHeaderCluster({ ...plan, extensions: options.extensions ?? [] });
  const { clusterBytes } = plan;

  storage.truncate(plan.total * clusterBytes);
  writeRefcountBlocks(storage, plan);
  const at = (cluster: number): number => cluster * clusterBytes;
  writeEntries(storage, at(plan.refcountTable.at), plan.refcountBlocks.count, 8, (index) =>
    at(plan.refcountBlocks.at + index),
  );
  if (plan.l2.count > 0) {
    writeEntries(storage, at(plan.l1.at), plan.l1.entries, 8, (index) => at(plan.l2.at + index), COPIED);
    // The subclusters of an extended entry stay unallocated: they have a place, but no data yet.
    const entryBytes = plan.extendedL2 ? 16 : 8;
    writeEntries(storage, at(plan.l2.at), plan.data.count, entryBytes, (index) => at(plan.data.at + index), COPIED);
  }
  storage.flush();
  storage.write(header, 0, header.length, 0);
  storage.flush();
}

/** Bytes written at a time. */
const CHUNK_BYTES = 1024 * 1024;

/** A table of `count` entries of `entryBytes` bytes, the first 8 of which hold an offset and the flags of its high half. */
function writeEntries(
  storage: Storage,
  position: number,
  count: number,
  entryBytes: number,
  offsetOf: (index: number) => number,
  flags = 0,
): void {
  const chunk = new Uint8Array(Math.min(CHUNK_BYTES, count * entryBytes));
  const view = new DataView(chunk.buffer);
  const perChunk = chunk.length / entryBytes;
  for (let first = 0; first < count; first += perChunk) {
    const here = Math.min(perChunk, count - first);
    for (let index = 0; index < here; index++) {
      const offset = offsetOf(first + index);
      view.setUint32(index * entryBytes, highHalf(offset) | flags);
      view.setUint32(index * entryBytes + 4, lowHalf(offset));
    }
    storage.write(chunk, 0, here * entryBytes, position + first * entryBytes);
  }
}

/** Every cluster of the file has a refcount of 1. */
function writeRefcountBlocks(storage: Storage, plan: Plan): void {
  const { clusterBytes, refcountOrder, total } = plan;
  const perBlock = (clusterBytes * 8) / 2 ** refcountOrder;
  const block = new Uint8Array(clusterBytes);
  let filled = 0;
  for (let index = 0; index < plan.refcountBlocks.count; index++) {
    const here = Math.min(perBlock, total - index * perBlock);
    if (here < filled) block.fill(0);
    for (let entry = here < filled ? 0 : filled; entry < here; entry++) setRefcount(block, entry, refcountOrder, 1);
    filled = here;
    storage.write(block, 0, clusterBytes, (plan.refcountBlocks.at + index) * clusterBytes);
  }
}

/** What the header of a new image says. Offsets and counts are in clusters, but for `size`. */
export interface NewHeader
  extends Pick<
    Plan,
    'options' | 'version' | 'size' | 'clusterBytes' | 'refcountOrder' | 'extendedL2' | 'refcountTable' | 'l1' | 'total'
  > {
  /** Besides those that follow from the options. */
  readonly extensions?: readonly HeaderExtension[];
}

/** The first cluster of a new image. @throws FsError EINVAL if the backing file's name has no room */
export function newHeaderCluster(plan: NewHeader): Uint8Array {
  const { options, clusterBytes, version } = plan;
  const zstd = options.compressionType === 'zstd';
  const fixed = new Uint8Array(clusterBytes);
  const sum = (...bits: (bigint | false | undefined)[]): bigint =>
    bits.reduce<bigint>((all, bit) => all | (bit === false || bit === undefined ? 0n : bit), 0n);
  headerRecord.encode(
    {
      magic: MAGIC,
      version,
      clusterBits: Math.log2(clusterBytes),
      size: BigInt(plan.size),
      l1Entries: plan.l1.entries,
      l1TableOffset: BigInt(plan.l1.at * clusterBytes),
      refcountTableOffset: BigInt(plan.refcountTable.at * clusterBytes),
      refcountTableClusters: plan.refcountTable.count,
      incompatible: sum(
        options.dataFile && incompatible.DATA_FILE,
        zstd && incompatible.COMPRESSION_TYPE,
        plan.extendedL2 && incompatible.EXTENDED_L2,
      ),
      compatible: sum(options.lazyRefcounts && compatible.LAZY_REFCOUNTS),
      autoclear: sum(options.dataFile?.raw && autoclear.DATA_FILE_RAW),
      refcountOrder: plan.refcountOrder,
      headerLength: HEADER_BYTES,
      compressionType: zstd ? 1 : 0,
    },
    fixed,
  );
  if (version === 2) fixed.fill(0, HEADER_BYTES_V2);

  const text = new TextEncoder();
  const extensions: HeaderExtension[] = [];
  if (options.backing !== undefined) {
    extensions.push({ type: extensionType.BACKING_FORMAT, data: text.encode(options.backing.format) });
  }
  if (options.dataFile !== undefined) {
    extensions.push({ type: extensionType.DATA_FILE, data: text.encode(options.dataFile.file) });
  }
  extensions.push(...(plan.extensions ?? []));
  const names = { type: extensionType.FEATURE_NAMES, data: encodeFeatureNames(FEATURE_NAMES) };
  const nameBytes = text.encode(options.backing?.file ?? '').length;
  // The names are a courtesy; in small clusters what is needed comes first.
  if (version === 3 && HEADER_BYTES + extensionsBytes([...extensions, names]) + nameBytes <= clusterBytes) {
    extensions.push(names);
  }
  const header = decodeHeader(fixed, plan.total * clusterBytes);
  return encodeHeaderCluster(header, { extensions, backingFile: options.backing?.file });
}
