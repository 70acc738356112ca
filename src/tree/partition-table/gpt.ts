/** GUID partition tables (UEFI specification 2.10, section 5.3), for sectors of 512 and 4096 bytes. */
import { crc32 } from 'node:zlib';
import { littleEndian, u32, u64 } from '../../bytes/record.ts';
import { MAX_PARTITIONS, type Partition, type ReadBytes } from './partition.ts';

const SECTOR_BYTES = [512, 4096];

const gptHeader = littleEndian('GPT header', 92, {
  signature: u64,
  revision: u32,
  headerBytes: u32, // what the CRC covers: 92 up to one sector
  headerCrc: u32, // counts as zero in the sum
  reserved: u32,
  myLba: u64, // the sector this header is in
  alternateLba: u64,
  firstUsableLba: u64,
  lastUsableLba: u64,
  diskGuidLow: u64,
  diskGuidHigh: u64,
  entriesLba: u64,
  entryCount: u32,
  entryBytes: u32, // 128 × a power of two
  entriesCrc: u32,
});

const gptEntry = littleEndian('GPT entry', 56, {
  typeGuidLow: u64, // both halves zero: unused
  typeGuidHigh: u64,
  guidLow: u64,
  guidHigh: u64,
  firstLba: u64,
  lastLba: u64, // inclusive
  attributes: u64,
});

/** "EFI PART". */
const SIGNATURE = 0x5452_4150_2049_4645n;
const ENTRY_BYTES = 128;

/** The usual table has 16 KiB. More than this is nobody's table, and is not read at all. */
const MAX_TABLE_BYTES = 1 << 20;

/**
 * The partitions by the primary header, or by the backup where the primary header or its entries are damaged.
 * @param coveredSectors where the protective MBR says the disk ended: the backup stays there when the disk grows
 */
export function readGpt(diskBytes: number, coveredSectors: number, read: ReadBytes): readonly Partition[] {
  for (const sectorBytes of SECTOR_BYTES) {
    const sectors = Math.floor(diskBytes / sectorBytes);
    for (const lba of [1, sectors - 1, coveredSectors - 1]) {
      const partitions = readCopy(lba, { sectorBytes, sectors }, read);
      if (partitions !== undefined) return partitions;
    }
  }
  return [];
}

interface Geometry {
  readonly sectorBytes: number;
  readonly sectors: number;
}

/** One copy, whole and proved by its checksums; else undefined. */
function readCopy(lba: number, { sectorBytes, sectors }: Geometry, read: ReadBytes): Partition[] | undefined {
  const sector = lba > 0 ? read(lba * sectorBytes, sectorBytes) : undefined;
  if (sector === undefined) return undefined;
  const header = gptHeader.decode(sector);
  if (header.signature !== SIGNATURE || header.myLba !== BigInt(lba)) return undefined;
  if (header.headerBytes < gptHeader.bytes || header.headerBytes > sectorBytes) return undefined;
  if (headerCrc(sector.subarray(0, header.headerBytes)) !== header.headerCrc) return undefined;

  const { entryBytes, entryCount, entriesLba } = header;
  const powerOfTwo = (entryBytes & (entryBytes - 1)) === 0;
  if (entryBytes < ENTRY_BYTES || !powerOfTwo || entryBytes * entryCount > MAX_TABLE_BYTES) return undefined;
  if (entriesLba >= BigInt(sectors)) return undefined;
  const table = read(Number(entriesLba) * sectorBytes, entryBytes * entryCount);
  if (table === undefined || crc32(table) !== header.entriesCrc) return undefined;

  const partitions: Partition[] = [];
  for (let index = 0; index < Math.min(entryCount, MAX_PARTITIONS); index++) {
    const entry = gptEntry.decode(table, index * entryBytes);
    if (entry.typeGuidLow === 0n && entry.typeGuidHigh === 0n) continue;
    if (entry.firstLba > entry.lastLba || entry.lastLba >= BigInt(sectors)) continue;
    const [first, last] = [Number(entry.firstLba), Number(entry.lastLba)];
    partitions.push({ number: index + 1, start: first * sectorBytes, length: (last - first + 1) * sectorBytes });
  }
  return partitions;
}

function headerCrc(header: Uint8Array): number {
  const copy = Uint8Array.from(header);
  gptHeader.encode({ ...gptHeader.decode(header), headerCrc: 0 }, copy);
  return crc32(copy);
}
