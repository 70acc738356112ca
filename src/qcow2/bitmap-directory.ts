/** Persistent bitmaps, as far as their clusters must be known (qcow2 specification, "Bitmap directory", "Bitmap table"). */
import { bigEndian, u8, u16, u32, u64 } from '../bytes/record.ts';
import { CorruptImage } from '../errors.ts';
import { hex } from './units.ts';

const entryHead = bigEndian('bitmap directory entry', 24, {
  tableOffset: u64,
  tableEntries: u32,
  flags: u32,
  type: u8,
  granularityBits: u8,
  nameBytes: u16,
  extraBytes: u32,
});

/** QEMU's limits. */
const MAX_TABLE_ENTRIES = 0x800_0000;
const MAX_NAME_BYTES = 1023;
const MIN_GRANULARITY_BITS = 9;
const MAX_GRANULARITY_BITS = 31;
/** Flag: not saved in the end, so that its size may be an old one. */
const IN_USE = 1;
/** in_use, auto, extra_data_compatible. */
const KNOWN_FLAGS = 7;
const DIRTY_TRACKING = 1;

export interface BitmapTable {
  readonly offset: number;
  readonly entries: number;
}

/**
 * The tables of all bitmaps in a directory.
 * @throws CorruptImage if an entry passes the directory's end, or a number is out of its range
 */
export function decodeBitmapDirectory(
  bytes: Uint8Array,
  count: number,
  disk: { readonly size: number; readonly clusterBytes: number },
): BitmapTable[] {
  const { size, clusterBytes } = disk;
  const tables: BitmapTable[] = [];
  let at = 0;
  for (let index = 0; index < count; index++) {
    const fail = (what: string): CorruptImage => new CorruptImage(`bitmap directory entry ${index}: ${what}`);
    if (at + entryHead.bytes > bytes.length) throw fail('it passes the end of the directory');
    const head = entryHead.decode(bytes, at);
    if (head.tableOffset % BigInt(clusterBytes) !== 0n || head.tableOffset > Number.MAX_SAFE_INTEGER) {
      throw fail(`its table is at ${hex(head.tableOffset)}, which is no cluster`);
    }
    if (head.tableEntries > MAX_TABLE_ENTRIES) throw fail(`its table has ${head.tableEntries} entries`);
    if ((head.flags & ~KNOWN_FLAGS) !== 0 || head.type !== DIRTY_TRACKING) {
      throw fail(`its flags are ${hex(head.flags)}, its type is ${head.type}`);
    }
    if (head.nameBytes === 0 || head.nameBytes > MAX_NAME_BYTES) throw fail(`its name has ${head.nameBytes} bytes`);
    if (head.granularityBits < MIN_GRANULARITY_BITS || head.granularityBits > MAX_GRANULARITY_BITS) {
      throw fail(`its granularity has ${head.granularityBits} bits`);
    }
    const bitmapBytes = Math.ceil(Math.ceil(size / 2 ** head.granularityBits) / 8);
    const needed = Math.ceil(bitmapBytes / clusterBytes);
    if ((head.flags & IN_USE) === 0 && head.tableEntries !== needed) {
      throw fail(`its table has ${head.tableEntries} entries, the disk needs ${needed}`);
    }
    tables.push({ offset: Number(head.tableOffset), entries: head.tableEntries });
    at += Math.ceil((entryHead.bytes + head.extraBytes + head.nameBytes) / 8) * 8;
    if (at > bytes.length) throw fail('it passes the end of the directory');
  }
  return tables;
}

/**
 * Host offset of a bitmap table entry's cluster; 0 if it has none.
 * @throws CorruptImage if reserved bits are set or the offset is not aligned
 */
export function bitmapClusterOf(high: number, low: number, clusterBytes: number): number {
  const offset = (high & 0x00ff_ffff) * 2 ** 32 + ((low & 0xffff_fe00) >>> 0);
  const reserved = high >>> 24 !== 0 || (low & 0x1fe) !== 0 || (offset !== 0 && (low & 1) !== 0);
  if (reserved || offset % clusterBytes !== 0) {
    throw new CorruptImage(`a bitmap table entry is ${hex(high >>> 0)} ${hex(low >>> 0)}`);
  }
  return offset;
}
