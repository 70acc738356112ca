/** A layer of a chain that does not change, read without any cache: its tables straight from the file. */
import { CorruptImage } from '../errors.ts';
import type { Storage } from '../storage/storage.ts';
import { decompressCluster } from './compression.ts';
import type { Geometry } from './geometry.ts';
import {
  checkL1Entry,
  compressedBytes,
  compressedOffset,
  hostOf,
  type Kind,
  kind,
  kindOf,
  subclusterKind,
} from './l2-entry.ts';
import { hex } from './units.ts';

/** What one thread needs of a layer. */
export type FrozenLayer = FrozenImage | FrozenRaw;

/** A raw file: guest offset is host offset. */
export interface FrozenRaw {
  /** Bytes of the disk. */
  readonly size: number;
  readonly image: undefined;
  /** Where the data is. */
  readonly data: Storage;
}

export interface FrozenTables {
  readonly geometry: Geometry;
  /** Bytes of the disk. */
  readonly size: number;
  /** The L1 table as in the file. */
  readonly l1: DataView;
  readonly l1Entries: number;
}

const ENTRY_BYTES = 16;

/** A qcow2 image. */
export class FrozenImage {
  readonly size: number;
  readonly geometry: Geometry;
  readonly data: Storage;
  readonly #tables: FrozenTables;
  readonly #file: Storage;
  readonly #bytes = new Uint8Array(ENTRY_BYTES);
  readonly #entry = new DataView(this.#bytes.buffer);
  /** What `lookup` found. */
  readonly extent = { kind: kind.UNALLOCATED as Kind, host: 0, length: 0, high: 0, low: 0 };

  constructor(tables: FrozenTables, file: Storage, data: Storage) {
    this.size = tables.size;
    this.geometry = tables.geometry;
    this.#tables = tables;
    this.#file = file;
    this.data = data;
  }

  get image(): this {
    return this;
  }

  /** Host offset of an L2 table, 0 if there is none. @throws CorruptImage */
  l2Table(l1Index: number): number {
    const { l1, l1Entries, geometry } = this.#tables;
    if (l1Index >= l1Entries) return 0;
    const high = l1.getUint32(l1Index * 8);
    const low = l1.getUint32(l1Index * 8 + 4);
    if ((high | low) === 0) return 0;
    checkL1Entry(high, low, l1Index);
    const host = hostOf(high, low);
    if (host % geometry.clusterBytes !== 0) {
      throw new CorruptImage(
        `${this.#file.path}: L1 entry ${l1Index} points to ${hex(host)}, not the start of a cluster`,
      );
    }
    return host;
  }

  /** One past the last guest byte from `guest` on that no L2 table maps; `guest` itself if one does. */
  unmappedEnd(guest: number): number {
    const { l1, l1Entries, geometry } = this.#tables;
    let index = Math.floor(guest / geometry.l2SpanBytes);
    while (index < l1Entries && (l1.getUint32(index * 8) | l1.getUint32(index * 8 + 4)) === 0) index++;
    return index >= l1Entries ? Number.MAX_SAFE_INTEGER : Math.max(guest, index * geometry.l2SpanBytes);
  }

  /**
   * Read L2 entries.
   * @param table host offset of the L2 table
   * @returns whole entries read: fewer than `count` only if the table passes the end of the file
   */
  readEntries(table: number, first: number, count: number, target: Uint8Array): number {
    const { l2EntryBytes } = this.geometry;
    const got = this.#file.read(target, 0, count * l2EntryBytes, table + first * l2EntryBytes);
    return Math.floor(got / l2EntryBytes);
  }

  /**
   * Fill `extent` with what the layer has at `guest`, for at most `length` bytes, inside one cluster.
   * @throws CorruptImage
   */
  lookup(guest: number, length: number): void {
    const { extent, geometry } = this;
    const { clusterBytes, l2SpanBytes, unitBytes, unitsPerCluster } = geometry;
    const l1Index = Math.floor(guest / l2SpanBytes);
    const start = guest - (guest % clusterBytes);
    const end = Math.min(guest + length, start + clusterBytes);
    const table = this.l2Table(l1Index);
    extent.kind = kind.UNALLOCATED;
    extent.host = 0;
    extent.length = end - guest;
    if (table === 0) return;
    if (this.readEntries(table, (start - l1Index * l2SpanBytes) / clusterBytes, 1, this.#bytes) < 1) {
      throw new CorruptImage(
        `${this.#file.path}: the L2 table at ${hex(table)} lies past the end of the file; run vdskfs check on it`,
      );
    }
    const high = (extent.high = this.#entry.getUint32(0));
    const low = (extent.low = this.#entry.getUint32(4));
    let unit = Math.floor((guest - start) / unitBytes);
    extent.kind = unitKind(geometry, this.#entry, 0, unit);
    if (extent.kind === kind.DATA)
      extent.host = dataHost(geometry, this.#file.path, high, low, start) + (guest - start);
    while (++unit < unitsPerCluster && start + unit * unitBytes < end) {
      if (unitKind(geometry, this.#entry, 0, unit) !== extent.kind) {
        extent.length = start + unit * unitBytes - guest;
        break;
      }
    }
  }

  /** Decompress the cluster that `lookup` found; `guest`: where it is, for messages. @throws CorruptImage */
  decompress(target: Uint8Array, guest: number): void {
    const { clusterBits, compressionType } = this.geometry;
    const { high, low } = this.extent;
    const most = compressedBytes(high, low, clusterBits);
    const source = new Uint8Array(most);
    const got = this.#file.read(source, 0, most, compressedOffset(high, low, clusterBits));
    try {
      decompressCluster(compressionType, source, got, target);
    } catch (error) {
      throw new CorruptImage(
        `${this.#file.path}: the compressed cluster of guest offset ${hex(guest)} does not decompress`,
        { cause: error },
      );
    }
  }
}

/** Kind of a unit of the entry at byte `at`. @throws CorruptImage */
export function unitKind(geometry: Geometry, entries: DataView, at: number, unit: number): Kind {
  const { unitsPerCluster, version, externalData } = geometry;
  const high = entries.getUint32(at);
  const low = entries.getUint32(at + 4);
  if (unitsPerCluster === 1) return kindOf(high, low, version, externalData);
  return subclusterKind(high, low, entries.getUint32(at + 8), entries.getUint32(at + 12), unit, externalData);
}

/** Host offset of a cluster with data. @throws CorruptImage */
export function dataHost(geometry: Geometry, path: string, high: number, low: number, guest: number): number {
  const host = hostOf(high, low);
  if (host % geometry.clusterBytes !== 0) {
    throw new CorruptImage(`${path}: guest offset ${hex(guest)} maps to ${hex(host)}, not the start of a cluster`);
  }
  return host;
}
