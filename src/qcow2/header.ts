/**
 * The first cluster: header, header extensions, backing file name (qcow2 specification, "Header").
 * Every number in it is hostile until `decodeHeader` has checked it; the limits are QEMU's.
 */
import { bigEndian, u8, u16, u32, u64 } from '../bytes/record.ts';
import { CorruptImage, FsError } from '../errors.ts';
import type { Storage } from '../storage/storage.ts';
import {
  type BitmapsExtension,
  decodeBitmapsExtension,
  decodeExtensions,
  decodeFeatureNames,
  decodeText,
  encodeExtensions,
  extensionType,
  type FeatureName,
  type HeaderExtension,
  withExtension,
} from './header-extensions.ts';

/** 'QFI\xfb' */
export const MAGIC = 0x5146_49fb;

export const HEADER_BYTES_V2 = 72;
/** The least length of a version 3 header. */
export const HEADER_BYTES_V3 = 104;

/**
 * The header as this program knows it. A version 2 header ends at byte 72, a version 3 header at header_length;
 * a field behind that end is not present and counts as 0.
 */
export const headerRecord = bigEndian('qcow2 header', 112, {
  magic: u32,
  version: u32,
  backingFileOffset: u64,
  backingFileBytes: u32,
  clusterBits: u32,
  /** Virtual size in bytes. */
  size: u64,
  cryptMethod: u32,
  l1Entries: u32,
  l1TableOffset: u64,
  refcountTableOffset: u64,
  refcountTableClusters: u32,
  snapshotCount: u32,
  snapshotsOffset: u64,
  incompatible: u64,
  compatible: u64,
  autoclear: u64,
  refcountOrder: u32,
  headerLength: u32,
  compressionType: u8,
  padding1: u8,
  padding2: u16,
  padding4: u32,
});

/**
 * Byte offset of each field, for updates in place. Pairs that are switched by one write because they are adjacent:
 * l1Entries + l1TableOffset (12 bytes), refcountTableOffset + refcountTableClusters (12), snapshotCount + snapshotsOffset (12).
 */
export const headerAt = headerRecord.at;

/** Bits of incompatible_features. */
export const incompatible = {
  DIRTY: 1n << 0n,
  CORRUPT: 1n << 1n,
  DATA_FILE: 1n << 2n,
  COMPRESSION_TYPE: 1n << 3n,
  EXTENDED_L2: 1n << 4n,
} as const;
const KNOWN_INCOMPATIBLE = 0b11111n;

/** Bits of compatible_features. */
export const compatible = { LAZY_REFCOUNTS: 1n << 0n } as const;

/** Bits of autoclear_features. */
export const autoclear = {
  BITMAPS: 1n << 0n,
  DATA_FILE_RAW: 1n << 1n,
} as const;

/** QEMU's limits; memory used for a table never exceeds them. */
export const limits = {
  MIN_CLUSTER_BITS: 9,
  MAX_CLUSTER_BITS: 21,
  MAX_REFCOUNT_ORDER: 6,
  L1_BYTES: 32 * 1024 * 1024,
  REFCOUNT_TABLE_BYTES: 8 * 1024 * 1024,
  SNAPSHOTS: 65536,
  BACKING_NAME_BYTES: 1023,
  /** Subclusters are 1/32 of a cluster and at least a sector. */
  MIN_CLUSTER_BITS_EXTENDED_L2: 14,
} as const;

export type CompressionType = 'deflate' | 'zstd';
const COMPRESSION_TYPES: readonly CompressionType[] = ['deflate', 'zstd'];

export interface Header {
  readonly version: 2 | 3;
  /** Virtual size in bytes. */
  readonly size: number;
  readonly clusterBits: number;
  readonly clusterBytes: number;
  readonly l1Entries: number;
  readonly l1TableOffset: number;
  readonly refcountTableOffset: number;
  readonly refcountTableClusters: number;
  readonly snapshotCount: number;
  readonly snapshotsOffset: number;
  readonly incompatible: bigint;
  readonly compatible: bigint;
  readonly autoclear: bigint;
  readonly refcountOrder: number;
  /** 1, 2, 4, … 64 */
  readonly refcountBits: number;
  readonly headerLength: number;
  readonly compressionType: CompressionType;
  readonly extendedL2: boolean;
  readonly dirty: boolean;
  readonly corrupt: boolean;
  readonly lazyRefcounts: boolean;
  readonly externalDataFile: boolean;
  /** The data file is the plain disk as well. */
  readonly dataFileRaw: boolean;
  /** As recorded; relative to the image's directory. */
  readonly backingFile: string | undefined;
  readonly backingFileRaw: Uint8Array | undefined;
  readonly backingFormat: string | undefined;
  readonly dataFile: string | undefined;
  /** All, in the order of the file. */
  readonly extensions: readonly HeaderExtension[];
  /** Undefined also when the autoclear bit says that the bitmaps are out of date. */
  readonly bitmaps: BitmapsExtension | undefined;
  readonly featureNames: readonly FeatureName[];
  /** The `headerLength` bytes of the header itself, with fields that this program does not know. */
  readonly fixedPart: Uint8Array;
}

/** Entries in one L2 table. */
export const l2EntriesOf = (header: Pick<Header, 'clusterBytes' | 'extendedL2'>): number =>
  header.clusterBytes / (header.extendedL2 ? 16 : 8);

/** L1 entries that a disk of `size` bytes needs. */
export const l1EntriesFor = (size: number, header: Pick<Header, 'clusterBytes' | 'extendedL2'>): number =>
  Math.ceil(size / (header.clusterBytes * l2EntriesOf(header)));

export interface ReadHeaderOptions {
  /** Accept a refcount table that lies outside the file: the caller is about to rebuild it. */
  readonly refcountsUnusable?: boolean;
}

/**
 * Read and check the first cluster.
 * @throws FsError EINVAL no qcow2 image; ENOTSUP a feature or encryption this program does not know; EFBIG above 2^53
 * @throws CorruptImage a number is out of its range
 */
export function readHeader(storage: Storage, options: ReadHeaderOptions = {}): Header {
  const fileBytes = storage.size();
  try {
    const start = readStart(storage, headerRecord.bytes);
    const { clusterBits } = decodePrelude(start);
    const cluster = readStart(storage, 2 ** clusterBits);
    return decodeHeader(cluster, fileBytes, options);
  } catch (error) {
    throw withPath(error, storage.path);
  }
}

function readStart(storage: Storage, bytes: number): Uint8Array {
  const target = new Uint8Array(bytes);
  return target.subarray(0, storage.read(target, 0, bytes, 0));
}

/** The same failure with the file's name in front. */
function withPath(error: unknown, path: string): unknown {
  if (error instanceof CorruptImage) return new CorruptImage(`${path}: ${error.message}`, { cause: error });
  if (error instanceof FsError)
    return new FsError(error.errno, `${path}: ${error.message}`, {
      cause: error,
    });
  return error;
}

const wrong = (field: keyof typeof headerAt, value: number | bigint, rule: string): CorruptImage =>
  new CorruptImage(
    `header field ${SPEC_NAMES[field] ?? field} at byte ${headerAt[field]} is ${value}, ${rule}; the image is damaged`,
  );

/** The specification's names of the fields that messages mention. */
const SPEC_NAMES: { readonly [K in keyof typeof headerAt]?: string } = {
  backingFileOffset: 'backing_file_offset',
  backingFileBytes: 'backing_file_size',
  clusterBits: 'cluster_bits',
  size: 'size',
  cryptMethod: 'crypt_method',
  l1Entries: 'l1_size',
  l1TableOffset: 'l1_table_offset',
  refcountTableOffset: 'refcount_table_offset',
  refcountTableClusters: 'refcount_table_clusters',
  snapshotCount: 'nb_snapshots',
  snapshotsOffset: 'snapshots_offset',
  refcountOrder: 'refcount_order',
  headerLength: 'header_length',
  compressionType: 'compression_type',
};

/** Magic, version and cluster size: what must be known before the rest can be read. */
function decodePrelude(start: Uint8Array): {
  version: 2 | 3;
  clusterBits: number;
} {
  if (start.length === 0) throw new FsError('EINVAL', 'the file is empty, so it is no qcow2 image');
  const view = new DataView(start.buffer, start.byteOffset, start.byteLength);
  if (start.length < 4 || view.getUint32(headerAt.magic) !== MAGIC) {
    throw new FsError('EINVAL', 'not a qcow2 image (it does not start with QFI\\xfb)');
  }
  if (start.length < HEADER_BYTES_V2) {
    throw new FsError('EINVAL', `the file ends after ${start.length} bytes, within the qcow2 header; it was cut off`);
  }
  const version = view.getUint32(headerAt.version);
  if (version !== 2 && version !== 3) {
    throw new FsError('ENOTSUP', `qcow2 version ${version} is not known; versions 2 and 3 are`);
  }
  if (version === 3 && start.length < HEADER_BYTES_V3) {
    throw new FsError('EINVAL', `the file ends after ${start.length} bytes, within the qcow2 header; it was cut off`);
  }
  const clusterBits = view.getUint32(headerAt.clusterBits);
  if (clusterBits < limits.MIN_CLUSTER_BITS || clusterBits > limits.MAX_CLUSTER_BITS) {
    throw wrong('clusterBits', clusterBits, `must be ${limits.MIN_CLUSTER_BITS} to ${limits.MAX_CLUSTER_BITS}`);
  }
  return { version, clusterBits };
}

/**
 * Decode and check `cluster`, the first cluster of a file of `fileBytes` bytes (shorter if the file is).
 * @throws as `readHeader`, without the file's name
 */
export function decodeHeader(cluster: Uint8Array, fileBytes: number, options: ReadHeaderOptions = {}): Header {
  const { version, clusterBits } = decodePrelude(cluster);
  const clusterBytes = 2 ** clusterBits;
  const headerLength = headerLengthOf(cluster, version, clusterBytes);
  const fixedPart = cluster.slice(0, headerLength);

  const present = new Uint8Array(headerRecord.bytes);
  present.set(fixedPart.subarray(0, headerRecord.bytes));
  const raw = headerRecord.decode(present);

  const name = backingNameOf(raw, headerLength, cluster, clusterBytes);
  const extensionsEnd = raw.backingFileOffset === 0n ? cluster.length : Number(raw.backingFileOffset);
  const extensions = decodeExtensions(cluster, headerLength, extensionsEnd);
  const dataOf = (type: number): Uint8Array | undefined =>
    extensions.find((extension) => extension.type === type)?.data;
  const textOf = (type: number): string | undefined => {
    const data = dataOf(type);
    return data === undefined ? undefined : decodeText(data);
  };
  const featureNames = decodeFeatureNames(dataOf(extensionType.FEATURE_NAMES) ?? new Uint8Array());

  refuseUnknownFeatures(raw.incompatible, featureNames);
  refuseEncryption(raw.cryptMethod);

  const extendedL2 = (raw.incompatible & incompatible.EXTENDED_L2) !== 0n;
  if (extendedL2 && clusterBits < limits.MIN_CLUSTER_BITS_EXTENDED_L2) {
    throw wrong(
      'clusterBits',
      clusterBits,
      `must be at least ${limits.MIN_CLUSTER_BITS_EXTENDED_L2} with extended L2 entries`,
    );
  }
  const refcountOrder = version === 2 ? 4 : raw.refcountOrder;
  if (refcountOrder > limits.MAX_REFCOUNT_ORDER) {
    throw wrong('refcountOrder', refcountOrder, `must be 0 to ${limits.MAX_REFCOUNT_ORDER}`);
  }
  const externalDataFile = (raw.incompatible & incompatible.DATA_FILE) !== 0n;
  const bitmapsData = (raw.autoclear & autoclear.BITMAPS) === 0n ? undefined : dataOf(extensionType.BITMAPS);
  const shape = { clusterBytes, extendedL2 };
  const size = virtualSizeOf(raw.size);
  checkTables(raw, shape, size, fileBytes, options);

  return {
    version,
    size,
    clusterBits,
    clusterBytes,
    l1Entries: raw.l1Entries,
    l1TableOffset: Number(raw.l1TableOffset),
    refcountTableOffset: Number(raw.refcountTableOffset),
    refcountTableClusters: raw.refcountTableClusters,
    snapshotCount: raw.snapshotCount,
    snapshotsOffset: Number(raw.snapshotsOffset),
    incompatible: raw.incompatible,
    compatible: raw.compatible,
    autoclear: raw.autoclear,
    refcountOrder,
    refcountBits: 2 ** refcountOrder,
    headerLength,
    compressionType: compressionTypeOf(raw.compressionType, raw.incompatible),
    extendedL2,
    dirty: (raw.incompatible & incompatible.DIRTY) !== 0n,
    corrupt: (raw.incompatible & incompatible.CORRUPT) !== 0n,
    lazyRefcounts: (raw.compatible & compatible.LAZY_REFCOUNTS) !== 0n,
    externalDataFile,
    dataFileRaw: externalDataFile && (raw.autoclear & autoclear.DATA_FILE_RAW) !== 0n,
    backingFile: name === undefined ? undefined : decodeText(name),
    backingFileRaw: name,
    backingFormat: textOf(extensionType.BACKING_FORMAT),
    dataFile: textOf(extensionType.DATA_FILE),
    extensions,
    bitmaps: bitmapsData === undefined ? undefined : decodeBitmapsExtension(bitmapsData, clusterBytes),
    featureNames,
    fixedPart,
  };
}

type RawHeader = ReturnType<typeof headerRecord.decode>;

function headerLengthOf(cluster: Uint8Array, version: 2 | 3, clusterBytes: number): number {
  if (version === 2) return HEADER_BYTES_V2;
  const view = new DataView(cluster.buffer, cluster.byteOffset, cluster.byteLength);
  const length = view.getUint32(headerAt.headerLength);
  if (length < HEADER_BYTES_V3 || length > clusterBytes || length % 8 !== 0) {
    throw wrong('headerLength', length, `must be ${HEADER_BYTES_V3} to ${clusterBytes} in steps of 8`);
  }
  if (length > cluster.length) {
    throw new FsError('EINVAL', `the file ends after ${cluster.length} bytes, within the qcow2 header; it was cut off`);
  }
  return length;
}

function backingNameOf(
  raw: RawHeader,
  headerLength: number,
  cluster: Uint8Array,
  clusterBytes: number,
): Uint8Array | undefined {
  const { backingFileOffset: offset, backingFileBytes: bytes } = raw;
  // Without an offset the length is undefined by the specification.
  if (offset === 0n) return undefined;
  if (offset < BigInt(headerLength) || offset > BigInt(clusterBytes)) {
    throw wrong('backingFileOffset', offset, `must be ${headerLength} to ${clusterBytes}`);
  }
  const start = Number(offset);
  const room = Math.min(limits.BACKING_NAME_BYTES, clusterBytes - start);
  if (bytes > room) throw wrong('backingFileBytes', bytes, `must be at most ${room} at that place`);
  if (start + bytes > cluster.length) {
    throw new FsError('EINVAL', `the file ends after ${cluster.length} bytes, within the backing file's name`);
  }
  return bytes === 0 ? undefined : cluster.slice(start, start + bytes);
}

function refuseUnknownFeatures(features: bigint, names: readonly FeatureName[]): void {
  const unknown = features & ~KNOWN_INCOMPATIBLE;
  if (unknown === 0n) return;
  const described: string[] = [];
  for (let bit = 0; bit < 64; bit++) {
    if ((unknown & (1n << BigInt(bit))) === 0n) continue;
    const name = names.find((entry) => entry.kind === 'incompatible' && entry.bit === bit)?.name;
    described.push(name ? `${JSON.stringify(name)} (bit ${bit})` : `bit ${bit}`);
  }
  throw new FsError(
    'ENOTSUP',
    `the image uses incompatible features that this version does not know: ${described.join(', ')}`,
  );
}

function refuseEncryption(method: number): void {
  if (method === 0) return;
  if (method > 2) throw wrong('cryptMethod', method, 'must be 0 to 2');
  const name = method === 1 ? 'AES' : 'LUKS';
  throw new FsError(
    'ENOTSUP',
    `the image is encrypted (${name}), which is not supported; decrypt it first with qemu-img convert`,
  );
}

function virtualSizeOf(size: bigint): number {
  if (size > BigInt(Number.MAX_SAFE_INTEGER)) {
    throw new FsError('EFBIG', `header field size at byte ${headerAt.size} is ${size}, more than 2^53 bytes`);
  }
  return Number(size);
}

function compressionTypeOf(value: number, features: bigint): CompressionType {
  const flagged = (features & incompatible.COMPRESSION_TYPE) !== 0n;
  const type = COMPRESSION_TYPES[value];
  if (type === undefined) {
    throw new FsError('ENOTSUP', `compression type ${value} is not known; 0 (deflate) and 1 (zstd) are`);
  }
  if (flagged !== (value !== 0)) {
    throw wrong(
      'compressionType',
      value,
      `which contradicts incompatible feature bit 3 (${flagged ? 'set' : 'unset'})`,
    );
  }
  return type;
}

function checkTables(
  raw: RawHeader,
  shape: Pick<Header, 'clusterBytes' | 'extendedL2'>,
  size: number,
  fileBytes: number,
  options: ReadHeaderOptions,
): void {
  const { clusterBytes } = shape;
  if (raw.l1Entries > limits.L1_BYTES / 8) {
    throw wrong('l1Entries', raw.l1Entries, `must be at most ${limits.L1_BYTES / 8}`);
  }
  const needed = l1EntriesFor(size, shape);
  if (raw.l1Entries < needed) {
    throw wrong('l1Entries', raw.l1Entries, `too small for the virtual size of ${size} bytes, which needs ${needed}`);
  }
  checkTable('l1TableOffset', raw.l1TableOffset, raw.l1Entries * 8, clusterBytes, fileBytes);

  const maxClusters = limits.REFCOUNT_TABLE_BYTES / clusterBytes;
  const { refcountTableClusters } = raw;
  if (refcountTableClusters > maxClusters) {
    throw wrong('refcountTableClusters', refcountTableClusters, `must be at most ${maxClusters}`);
  }
  if (options.refcountsUnusable !== true) {
    if (refcountTableClusters === 0) throw wrong('refcountTableClusters', 0, 'must be at least 1');
    if (raw.refcountTableOffset === 0n) throw wrong('refcountTableOffset', 0, 'where the header is');
    const tableBytes = refcountTableClusters * clusterBytes;
    checkTable('refcountTableOffset', raw.refcountTableOffset, tableBytes, clusterBytes, fileBytes);
  } else if (raw.refcountTableOffset > BigInt(Number.MAX_SAFE_INTEGER)) {
    throw wrong('refcountTableOffset', raw.refcountTableOffset, 'must be below 2^53');
  }

  if (raw.snapshotCount > limits.SNAPSHOTS) {
    throw wrong('snapshotCount', raw.snapshotCount, `must be at most ${limits.SNAPSHOTS}`);
  }
  // Entries have variable length: only the first one's start can be checked here.
  checkTable('snapshotsOffset', raw.snapshotsOffset, Math.min(raw.snapshotCount, 1), clusterBytes, fileBytes);
}

/** A table of `bytes` bytes must start at a cluster other than the header's and end in the file's last cluster at most. */
function checkTable(
  field: 'l1TableOffset' | 'refcountTableOffset' | 'snapshotsOffset',
  offset: bigint,
  bytes: number,
  clusterBytes: number,
  fileBytes: number,
): void {
  // QEMU leaves the offset of an empty table undefined.
  if (offset > BigInt(Number.MAX_SAFE_INTEGER - bytes)) throw wrong(field, offset, 'must be below 2^53');
  if (bytes === 0) return;
  if (offset % BigInt(clusterBytes) !== 0n) {
    throw wrong(field, offset, `must be a multiple of the cluster size, ${clusterBytes}`);
  }
  if (offset === 0n) throw wrong(field, 0, 'where the header is');
  // The last cluster of a file may be written in part only: what is missing reads as zeros.
  const end = Math.ceil(fileBytes / clusterBytes) * clusterBytes;
  if (Number(offset) + bytes > end) {
    throw wrong(field, offset, `so the table's ${bytes} bytes pass the end of the file (${fileBytes} bytes)`);
  }
}

/** What `encodeHeaderCluster` can change. Undefined removes, an absent key keeps. */
export interface HeaderChanges {
  readonly backingFile?: string | Uint8Array | undefined;
  readonly backingFormat?: string | undefined;
  readonly dataFile?: string | undefined;
  /** Instead of the header's own list; the changes above are applied to it. */
  readonly extensions?: readonly HeaderExtension[];
  readonly size?: number;
  readonly l1Entries?: number;
  readonly l1TableOffset?: number;
  readonly refcountTableOffset?: number;
  readonly refcountTableClusters?: number;
  readonly snapshotCount?: number;
  readonly snapshotsOffset?: number;
  readonly incompatible?: bigint;
  readonly compatible?: bigint;
  readonly autoclear?: bigint;
}

/**
 * The whole first cluster with changes applied; unknown header fields and extensions are kept byte for byte.
 * @throws FsError EINVAL if the variable part does not fit in the cluster, or the backing name is longer than 1023 bytes
 */
export function encodeHeaderCluster(header: Header, changes: HeaderChanges = {}): Uint8Array {
  const encoder = new TextEncoder();
  const text = (value: string | undefined): Uint8Array | undefined =>
    value === undefined ? undefined : encoder.encode(value);

  let extensions = changes.extensions ?? header.extensions;
  if ('backingFormat' in changes) {
    extensions = withExtension(extensions, extensionType.BACKING_FORMAT, text(changes.backingFormat));
  }
  if ('dataFile' in changes) {
    extensions = withExtension(extensions, extensionType.DATA_FILE, text(changes.dataFile));
  }
  const given = 'backingFile' in changes ? changes.backingFile : header.backingFileRaw;
  const name = (typeof given === 'string' ? text(given) : given) ?? new Uint8Array();
  if (name.length > limits.BACKING_NAME_BYTES) {
    throw new FsError(
      'EINVAL',
      `the backing file's name has ${name.length} bytes, the format allows ${limits.BACKING_NAME_BYTES}; use a shorter or relative path`,
    );
  }

  const area = encodeExtensions(extensions);
  const nameAt = header.headerLength + area.length;
  if (nameAt + name.length > header.clusterBytes) {
    throw new FsError(
      'EINVAL',
      `header, extensions and backing file name take ${nameAt + name.length} bytes, a cluster has ${header.clusterBytes}`,
    );
  }
  const cluster = new Uint8Array(header.clusterBytes);
  cluster.set(header.fixedPart);
  cluster.set(area, header.headerLength);
  cluster.set(name, nameAt);

  const view = new DataView(cluster.buffer);
  view.setBigUint64(headerAt.backingFileOffset, name.length === 0 ? 0n : BigInt(nameAt));
  view.setUint32(headerAt.backingFileBytes, name.length);
  for (const field of ['size', 'l1TableOffset', 'refcountTableOffset', 'snapshotsOffset'] as const) {
    const value = changes[field];
    if (value !== undefined) view.setBigUint64(headerAt[field], BigInt(value));
  }
  for (const field of ['l1Entries', 'refcountTableClusters', 'snapshotCount'] as const) {
    const value = changes[field];
    if (value !== undefined) view.setUint32(headerAt[field], value);
  }
  if (header.version >= 3) {
    for (const field of ['incompatible', 'compatible', 'autoclear'] as const) {
      const value = changes[field];
      if (value !== undefined) view.setBigUint64(headerAt[field], value);
    }
  }
  return cluster;
}
