/**
 * L1 and L2 entries (qcow2 specification, "L1 table entry", "L2 table entry"): 64 big-endian bits, handled as two 32-bit
 * halves. Everything here is pure and allocates nothing, so that the data path can use it.
 */
import { CorruptImage } from '../errors.ts';
import type { HostOffset } from './units.ts';
import { highHalf, joinHalves, lowHalf } from './units.ts';

/** Bit 63: the refcount is exactly one, so the cluster may be overwritten in place. */
export const COPIED = 0x8000_0000;
/** Bit 62: the entry is a compressed cluster descriptor. */
export const COMPRESSED = 0x4000_0000;
/** Bit 0 of a standard entry, version 3: the cluster reads as zeros; its host cluster, if any, is preallocated. */
export const ALL_ZEROES = 1;

/** Bits 32-55 of the host offset. */
const OFFSET_HIGH = 0x00ff_ffff;
/** Bits 9-31 of the host offset. */
const OFFSET_LOW = 0xffff_fe00;
/** Bits 56-61: reserved in every entry that is not compressed. */
const RESERVED_HIGH = 0x3f00_0000;
/** Bits 1-8. */
const RESERVED_LOW = 0x1fe;

/** What an entry says of its guest cluster (of one subcluster, with extended L2 entries). */
export const kind = { UNALLOCATED: 0, ZERO: 1, DATA: 2, COMPRESSED: 3 } as const;
export type Kind = (typeof kind)[keyof typeof kind];

const inHex = (high: number, low: number): string =>
  `0x${(high >>> 0).toString(16).padStart(8, '0')}${(low >>> 0).toString(16).padStart(8, '0')}`;

/** Host cluster of an L1 entry, or of an L2 entry that is not compressed; 0 means none. */
export const hostOf = (high: number, low: number): HostOffset =>
  joinHalves(high & OFFSET_HIGH, low & OFFSET_LOW) as HostOffset;

export const isCopied = (high: number): boolean => (high & COPIED) !== 0;
export const isCompressed = (high: number): boolean => (high & COMPRESSED) !== 0;

/** @throws CorruptImage if a reserved bit of an L1 entry is set (bits 0-8 and 56-62) */
export function checkL1Entry(high: number, low: number, index: number): void {
  if ((high & (RESERVED_HIGH | COMPRESSED)) !== 0 || (low & 0x1ff) !== 0) {
    throw new CorruptImage(`L1 entry ${index} is ${inHex(high, low)}: reserved bits are set`);
  }
}

/**
 * Classify a standard (8-byte) entry.
 * @param external the data is in a file of its own, where host offset 0 is valid if COPIED is set
 * @throws CorruptImage if a reserved bit is set; in version 2 the zero flag is one
 */
export function kindOf(high: number, low: number, version: number, external = false): Kind {
  if ((high & COMPRESSED) !== 0) return kind.COMPRESSED;
  if ((high & RESERVED_HIGH) !== 0 || (low & RESERVED_LOW) !== 0 || (version < 3 && (low & ALL_ZEROES) !== 0)) {
    throw new CorruptImage(`L2 entry ${inHex(high, low)}: reserved bits are set`);
  }
  if ((low & ALL_ZEROES) !== 0) return kind.ZERO;
  return hasHost(high, low, external) ? kind.DATA : kind.UNALLOCATED;
}

/** Whether an entry that is not compressed names a host cluster. */
export const hasHost = (high: number, low: number, external: boolean): boolean =>
  (high & OFFSET_HIGH) !== 0 || (low & OFFSET_LOW) !== 0 || (external && (high & COPIED) !== 0);

/** Subclusters in a cluster with extended L2 entries (specification, "Extended L2 Entries"). */
export const SUBCLUSTERS = 32;

/**
 * Classify one subcluster of an extended (16-byte) entry.
 * @param zero bits 32-63 of the subcluster bitmap: reads as zeros
 * @param allocated bits 0-31 of the bitmap: the data is in the host cluster
 * @throws CorruptImage for combinations that the format forbids
 */
export function subclusterKind(
  high: number,
  low: number,
  zero: number,
  allocated: number,
  index: number,
  external = false,
): Kind {
  if ((high & COMPRESSED) !== 0) {
    // The specification wants the bitmap of a compressed cluster to be 0; QEMU refuses others as we do.
    if (zero !== 0 || allocated !== 0) {
      throw new CorruptImage(`extended L2 entry ${inHex(high, low)}: a compressed cluster with a subcluster bitmap`);
    }
    return kind.COMPRESSED;
  }
  if ((high & RESERVED_HIGH) !== 0 || (low & (RESERVED_LOW | ALL_ZEROES)) !== 0) {
    throw new CorruptImage(`extended L2 entry ${inHex(high, low)}: reserved bits are set`);
  }
  if ((zero & allocated) !== 0) {
    throw new CorruptImage(`extended L2 entry ${inHex(high, low)}: a subcluster is both zero and allocated`);
  }
  const bit = 1 << index;
  if ((zero & bit) !== 0) return kind.ZERO;
  if ((allocated & bit) === 0) return kind.UNALLOCATED;
  if (!hasHost(high, low, external)) {
    throw new CorruptImage(`extended L2 entry ${inHex(high, low)}: allocated subclusters without a host cluster`);
  }
  return kind.DATA;
}

/** Bit of the high half where a compressed descriptor's sector count begins: bit x = 62 - (cluster_bits - 8). */
const sectorsShift = (clusterBits: number): number => 62 - (clusterBits - 8) - 32;

/** Host offset of the compressed bytes; not aligned to anything. */
export const compressedOffset = (high: number, low: number, clusterBits: number): HostOffset =>
  joinHalves(high & (2 ** sectorsShift(clusterBits) - 1), low) as HostOffset;

/** Most bytes that the compressed data may use: to the end of its last 512-byte sector. */
export function compressedBytes(high: number, low: number, clusterBits: number): number {
  const additionalSectors = (high & 0x3fff_ffff) >>> sectorsShift(clusterBits);
  return (additionalSectors + 1) * 512 - (low & 511);
}

/** Make a compressed descriptor point to the same data at `offset`: as far into a sector as before. */
export function movedCompressed(entry: { high: number; low: number }, clusterBits: number, offset: number): void {
  const offsetBits = 2 ** sectorsShift(clusterBits) - 1;
  entry.high = ((entry.high & ~offsetBits) | highHalf(offset)) >>> 0;
  entry.low = lowHalf(offset);
}
