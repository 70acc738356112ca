/** Partition tables as bytes, for tests. */
import { crc32 } from 'node:zlib';

export interface MbrEntry {
  readonly type: number;
  /** Sectors of 512 bytes. */
  readonly start: number;
  readonly sectors: number;
  readonly boot?: number;
}

/** Write an MBR or EBR at `at` (bytes). */
export function putMbr(disk: Uint8Array, at: number, entries: readonly (MbrEntry | undefined)[]): void {
  const view = new DataView(disk.buffer, disk.byteOffset + at, 512);
  for (const [index, entry] of entries.entries()) {
    if (entry === undefined) continue;
    const from = 446 + 16 * index;
    view.setUint8(from, entry.boot ?? 0);
    view.setUint8(from + 4, entry.type);
    view.setUint32(from + 8, entry.start, true);
    view.setUint32(from + 12, entry.sectors, true);
  }
  view.setUint16(510, 0xaa55, true);
}

export interface Gpt {
  readonly sectorBytes?: number;
  /** By entry number from 0; LBAs, both inclusive. */
  readonly partitions: Readonly<Record<number, readonly [first: number, last: number]>>;
  readonly entryCount?: number;
  readonly entryBytes?: number;
}

/** Write a protective MBR and both copies of a GPT. Returns where the header and entries of each copy are, in bytes. */
export function putGpt(disk: Uint8Array, { sectorBytes = 512, partitions, entryCount = 128, entryBytes = 128 }: Gpt) {
  const sectors = disk.length / sectorBytes;
  const tableSectors = Math.ceil((entryCount * entryBytes) / sectorBytes);
  putMbr(disk, 0, [{ type: 0xee, start: 1, sectors: sectors - 1 }]);
  const table = new Uint8Array(entryCount * entryBytes);
  const view = new DataView(table.buffer);
  for (const [index, [first, last]] of Object.entries(partitions)) {
    const from = Number(index) * entryBytes;
    table.fill(0xa5, from, from + 16); // type GUID: any but zero
    view.setBigUint64(from + 32, BigInt(first), true);
    view.setBigUint64(from + 40, BigInt(last), true);
  }
  const copy = (lba: number, other: number, entriesLba: number) => {
    const header = new Uint8Array(92);
    const fields = new DataView(header.buffer);
    header.set(Buffer.from('EFI PART'));
    fields.setUint32(8, 0x10000, true);
    fields.setUint32(12, 92, true);
    fields.setBigUint64(24, BigInt(lba), true);
    fields.setBigUint64(32, BigInt(other), true);
    fields.setBigUint64(72, BigInt(entriesLba), true);
    fields.setUint32(80, entryCount, true);
    fields.setUint32(84, entryBytes, true);
    fields.setUint32(88, crc32(table), true);
    fields.setUint32(16, crc32(header), true);
    disk.set(header, lba * sectorBytes);
    disk.set(table, entriesLba * sectorBytes);
    return { header: lba * sectorBytes, entries: entriesLba * sectorBytes };
  };
  const last = sectors - 1;
  return { primary: copy(1, last, 2), backup: copy(last, 1, last - tableSectors) };
}
