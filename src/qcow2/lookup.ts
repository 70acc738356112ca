/** From guest bytes to host bytes: the L1 and L2 tables (qcow2 specification, "Cluster mapping"). */
import { CorruptImage } from '../errors.ts';
import type { Image } from './image.ts';
import { number } from './image.ts';
import { checkL1Entry, hostOf, kind, kindOf, subclusterKind } from './l2-entry.ts';
import { hex } from './units.ts';

/** An L1 table other than the active one: a snapshot's, in its own memory. */
export interface L1Table {
  readonly view: DataView;
  readonly entries: number;
  /** Guest bytes of the disk, where state of the guest follows: that has nothing below it. Undefined: all is disk. */
  readonly diskBytes?: number;
}

/**
 * Host offset of the L2 table that maps `guest`, 0 if there is none. With the mutex held.
 * @throws CorruptImage
 */
export function l2TableAt(image: Image, table: L1Table | undefined, l1Index: number): number {
  const entries = table === undefined ? (image.numbers[number.L1_ENTRIES] as number) : table.entries;
  if (l1Index >= entries) return 0;
  const view = table === undefined ? image.l1 : table.view;
  const high = view.getUint32(l1Index * 8);
  const low = view.getUint32(l1Index * 8 + 4);
  if (high === 0 && low === 0) return 0;
  checkL1Entry(high, low, l1Index);
  const host = hostOf(high, low);
  if (host % image.geometry.clusterBytes !== 0) {
    throw new CorruptImage(
      `${image.file.path}: L1 entry ${l1Index} points to ${hex(host)}, not the start of a cluster`,
    );
  }
  return host;
}

/**
 * Fill `image.extent` with what is at `guest`, for at most `length` bytes: as long as the kind stays the same and the
 * host bytes are adjacent, inside one L2 table. With the mutex held.
 * @param table a snapshot's L1 table; undefined: the active one
 * @throws CorruptImage
 */
export function lookup(image: Image, table: L1Table | undefined, guest: number, length: number): void {
  const { geometry, extent } = image;
  const { clusterBytes, unitBytes, unitsPerCluster, l2SpanBytes, l2EntryBytes, sliceBytes, version, externalData } =
    geometry;
  const l1Index = Math.floor(guest / l2SpanBytes);
  const spanStart = l1Index * l2SpanBytes;
  const l2Table = l2TableAt(image, table, l1Index);
  if (l2Table === 0) {
    unmapped(image, table, l1Index, guest, length);
    return;
  }
  const end = Math.min(guest + length, spanStart + l2SpanBytes);
  const { l2 } = image;
  const bytes = l2.bytes;

  let unit = Math.floor((guest - spanStart) / unitBytes);
  let position = guest;
  let entryAt = -1;
  let cluster = -1;
  let sliceStart = -1;
  let slicePosition = 0;
  let high = 0;
  let low = 0;
  let zero = 0;
  let allocated = 0;
  let host = 0;
  let runKind: number = -1;
  let runHost = 0;

  while (position < end) {
    const inCluster = unit % unitsPerCluster;
    const unitCluster = (unit - inCluster) / unitsPerCluster;
    if (unitCluster !== cluster) {
      cluster = unitCluster;
      entryAt = cluster * l2EntryBytes;
      const start = entryAt - (entryAt % sliceBytes);
      if (start !== sliceStart) {
        sliceStart = start;
        slicePosition = l2.load(l2Table + start);
      }
      const at = slicePosition + (entryAt - sliceStart);
      high = readWord(bytes, at);
      low = readWord(bytes, at + 4);
      if (unitsPerCluster !== 1) {
        zero = readWord(bytes, at + 8);
        allocated = readWord(bytes, at + 12);
      }
    }
    const unitKind =
      unitsPerCluster === 1
        ? kindOf(high, low, version, externalData)
        : subclusterKind(high, low, zero, allocated, inCluster, externalData);
    const unitStart = spanStart + unit * unitBytes;
    if (unitKind === kind.DATA) {
      const clusterHost = hostOf(high, low);
      if (clusterHost % clusterBytes !== 0) {
        throw new CorruptImage(
          `${image.file.path}: guest offset ${hex(unitStart)} maps to ${hex(clusterHost)}, not the start of a cluster`,
        );
      }
      host = clusterHost + inCluster * unitBytes + (position - unitStart);
    }
    if (runKind === -1) {
      runKind = unitKind;
      runHost = host;
      if (unitKind === kind.COMPRESSED) {
        extent.high = high;
        extent.low = low;
        position = spanStart + (cluster + 1) * clusterBytes;
        break;
      }
    } else if (unitKind !== runKind || (unitKind === kind.DATA && host !== runHost + (position - guest))) {
      break;
    }
    unit++;
    position = unitStart + unitBytes;
  }
  extent.kind = runKind as Image['extent']['kind'];
  extent.host = runHost;
  extent.length = Math.min(position, end) - guest;
}

/** No L2 table: everything up to the next one that exists is unallocated. */
function unmapped(image: Image, table: L1Table | undefined, l1Index: number, guest: number, length: number): void {
  const { extent } = image;
  const { l2SpanBytes } = image.geometry;
  const entries = table === undefined ? (image.numbers[number.L1_ENTRIES] as number) : table.entries;
  const end = guest + length;
  let next = l1Index + 1;
  while (next * l2SpanBytes < end && next < entries && l2TableAt(image, table, next) === 0) next++;
  extent.kind = kind.UNALLOCATED;
  extent.host = 0;
  extent.length = (next >= entries ? end : Math.min(next * l2SpanBytes, end)) - guest;
}

/** A big-endian word, unsigned. */
const readWord = (bytes: Uint8Array, at: number): number =>
  (((bytes[at] as number) << 24) |
    ((bytes[at + 1] as number) << 16) |
    ((bytes[at + 2] as number) << 8) |
    (bytes[at + 3] as number)) >>>
  0;
