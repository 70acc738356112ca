/**
 * Header extensions: the variable part of the first cluster, between the header and the backing file name
 * (qcow2 specification, "Header extensions"). Unknown ones are kept byte for byte and in order.
 */
import { bigEndian, u8, u32, u64 } from '../bytes/record.ts';
import { CorruptImage } from '../errors.ts';
import { hex } from './units.ts';

export const extensionType = {
  END: 0x0000_0000,
  BACKING_FORMAT: 0xe279_2aca,
  FEATURE_NAMES: 0x6803_f857,
  BITMAPS: 0x2385_2875,
  LUKS_HEADER: 0x0537_be77,
  DATA_FILE: 0x4441_5441,
  /** 'vdsk': this program's own, see session-mark.ts. */
  SESSION: 0x7664_736b,
  /** 'vdsx': this program's own, see export-origin.ts. */
  ORIGIN: 0x7664_7378,
  /** 'vdso': this program's own, see overlay-mark.ts. */
  OVERLAY: 0x7664_736f,
  /** 'vdsa': this program's own, see overlay-mark.ts. */
  OVERLAYS_ELSEWHERE: 0x7664_7361,
} as const;

/** One extension as it stands in the file; `data` without the padding. */
export interface HeaderExtension {
  readonly type: number;
  readonly data: Uint8Array;
}

const extensionHead = bigEndian('header extension', 8, {
  type: u32,
  length: u32,
});

/** Data is padded to a multiple of this many bytes. */
const ALIGNMENT = 8;

const padded = (bytes: number): number => Math.ceil(bytes / ALIGNMENT) * ALIGNMENT;

/**
 * The extensions in `bytes[start, end)`, up to the END extension or the end of the area. Their data is copied.
 * @throws CorruptImage if one reaches past `end`
 */
export function decodeExtensions(bytes: Uint8Array, start: number, end: number): HeaderExtension[] {
  const extensions: HeaderExtension[] = [];
  for (let at = start; at + extensionHead.bytes <= end; ) {
    const { type, length } = extensionHead.decode(bytes, at);
    if (type === extensionType.END) break;
    const dataAt = at + extensionHead.bytes;
    if (length > end - dataAt) {
      throw new CorruptImage(
        `header extension ${hex(type)} at byte ${at} claims ${length} bytes, but only ${end - dataAt} are left`,
      );
    }
    extensions.push({ type, data: bytes.slice(dataAt, dataAt + length) });
    at = dataAt + padded(length);
  }
  return extensions;
}

/** Bytes that `encodeExtensions` writes. */
export const extensionsBytes = (extensions: readonly HeaderExtension[]): number =>
  extensions.reduce((sum, { data }) => sum + extensionHead.bytes + padded(data.length), extensionHead.bytes);

/** All extensions and the END mark, with padding. */
export function encodeExtensions(extensions: readonly HeaderExtension[]): Uint8Array {
  const target = new Uint8Array(extensionsBytes(extensions));
  let at = 0;
  for (const { type, data } of extensions) {
    extensionHead.encode({ type, length: data.length }, target, at);
    target.set(data, at + extensionHead.bytes);
    at += extensionHead.bytes + padded(data.length);
  }
  return target;
}

/** The list with the extension of that type replaced where it stands, appended, or (without `data`) left out. */
export function withExtension(
  extensions: readonly HeaderExtension[],
  type: number,
  data: Uint8Array | undefined,
): HeaderExtension[] {
  const at = extensions.findIndex((extension) => extension.type === type);
  const others = extensions.filter((extension) => extension.type !== type);
  if (data !== undefined) others.splice(at < 0 ? others.length : at, 0, { type, data });
  return others;
}

/** Where the persistent bitmaps are ("Bitmaps extension"). */
export interface BitmapsExtension {
  /** At least 1. */
  readonly count: number;
  readonly directoryBytes: number;
  /** Host offset, cluster aligned. */
  readonly directoryOffset: number;
}

const bitmapsRecord = bigEndian('bitmaps extension', 24, {
  count: u32,
  reserved: u32,
  directoryBytes: u64,
  directoryOffset: u64,
});

/** QEMU's limits: 65,535 bitmaps, a directory of 1 KiB for each. */
const MAX_BITMAPS = 65535;
const MAX_BITMAP_DIRECTORY_BYTES = 1024n * BigInt(MAX_BITMAPS);

/** @throws CorruptImage if a number is out of its range */
export function decodeBitmapsExtension(data: Uint8Array, clusterBytes: number): BitmapsExtension {
  if (data.length !== bitmapsRecord.bytes) {
    throw new CorruptImage(`bitmaps extension has ${data.length} bytes, must have ${bitmapsRecord.bytes}`);
  }
  const { count, reserved, directoryBytes, directoryOffset } = bitmapsRecord.decode(data);
  if (reserved !== 0) throw new CorruptImage(`bitmaps extension: reserved field is ${hex(reserved)}, must be 0`);
  if (count < 1 || count > MAX_BITMAPS) {
    throw new CorruptImage(`bitmaps extension: nb_bitmaps is ${count}, must be 1 to ${MAX_BITMAPS}`);
  }
  if (directoryBytes < 1n || directoryBytes > MAX_BITMAP_DIRECTORY_BYTES) {
    throw new CorruptImage(
      `bitmaps extension: bitmap_directory_size is ${directoryBytes}, must be 1 to ${MAX_BITMAP_DIRECTORY_BYTES}`,
    );
  }
  if (
    directoryOffset === 0n ||
    directoryOffset % BigInt(clusterBytes) !== 0n ||
    directoryOffset + directoryBytes > Number.MAX_SAFE_INTEGER
  ) {
    throw new CorruptImage(
      `bitmaps extension: bitmap_directory_offset is ${hex(directoryOffset)}, must be a cluster in the file`,
    );
  }
  return {
    count,
    directoryBytes: Number(directoryBytes),
    directoryOffset: Number(directoryOffset),
  };
}

export const encodeBitmapsExtension = (bitmaps: BitmapsExtension): Uint8Array =>
  bitmapsRecord.encode({
    count: bitmaps.count,
    directoryBytes: BigInt(bitmaps.directoryBytes),
    directoryOffset: BigInt(bitmaps.directoryOffset),
  });

/** One name of the feature name table. */
export interface FeatureName {
  readonly kind: 'incompatible' | 'compatible' | 'autoclear';
  /** Bit number, 0 to 63. */
  readonly bit: number;
  readonly name: string;
}

const FEATURE_KINDS = ['incompatible', 'compatible', 'autoclear'] as const;
const featureHead = bigEndian('feature name', 2, { kind: u8, bit: u8 });
/** Each entry: kind, bit, 46 bytes of name padded with zeros. */
const FEATURE_ENTRY_BYTES = 48;

/** Entries of unknown kind, impossible bit or cut short are skipped: the table only serves messages. */
export function decodeFeatureNames(data: Uint8Array): FeatureName[] {
  const names: FeatureName[] = [];
  for (let at = 0; at + FEATURE_ENTRY_BYTES <= data.length; at += FEATURE_ENTRY_BYTES) {
    const head = featureHead.decode(data, at);
    const kind = FEATURE_KINDS[head.kind];
    if (kind === undefined || head.bit > 63) continue;
    const text = data.subarray(at + featureHead.bytes, at + FEATURE_ENTRY_BYTES);
    const end = text.indexOf(0);
    names.push({
      kind,
      bit: head.bit,
      name: decodeText(end < 0 ? text : text.subarray(0, end)),
    });
  }
  return names;
}

/** @throws RangeError if a name is longer than 46 bytes */
export function encodeFeatureNames(names: readonly FeatureName[]): Uint8Array {
  const target = new Uint8Array(names.length * FEATURE_ENTRY_BYTES);
  names.forEach(({ kind, bit, name }, index) => {
    const at = index * FEATURE_ENTRY_BYTES;
    const text = new TextEncoder().encode(name);
    if (text.length > FEATURE_ENTRY_BYTES - featureHead.bytes) throw new RangeError(`feature name too long: ${name}`);
    featureHead.encode({ kind: FEATURE_KINDS.indexOf(kind), bit }, target, at);
    target.set(text, at + featureHead.bytes);
  });
  return target;
}

/** Text of the file; bytes that are no UTF-8 become U+FFFD. */
export const decodeText = (bytes: Uint8Array): string => new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes);
