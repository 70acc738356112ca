/**
 * The partition table of an MBR, and the chain of extended boot records (EBR) that holds the logical partitions.
 * Which entries count, and their numbers, follow Linux (block/partitions/msdos.c) so that loop devices agree with us.
 */
import { littleEndian, u8, u16, u32 } from '../../bytes/record.ts';
import { MAX_PARTITIONS, MBR_SECTOR_BYTES, type Partition, type ReadBytes } from './partition.ts';

const TABLE_AT = 446;
const ENTRIES = 4;
const SIGNATURE_AT = 510;
const signature = littleEndian('boot signature', 2, { value: u16 });
const SIGNATURE = 0xaa55;

/** Sectors are 512 bytes. */
const mbrEntry = littleEndian('partition entry', 16, {
  bootIndicator: u8, // 0x80: active, 0: not; anything else means that these bytes are no partition table
  startHead: u8,
  startSectorCylinder: u16,
  type: u8,
  endHead: u8,
  endSectorCylinder: u16,
  startSector: u32, // in an EBR: from this EBR for a partition, from the first EBR for the link to the next
  sectors: u32,
});
type MbrEntry = ReturnType<typeof mbrEntry.decode>;

const GPT_PROTECTIVE = 0xee;
/** CHS, LBA and Linux's own. */
const EXTENDED = [0x05, 0x0f, 0x85];
const isExtended = (entry: MbrEntry): boolean => EXTENDED.includes(entry.type);

/** Numbers 1 to 4 belong to the entries of the MBR itself. */
const FIRST_LOGICAL = 5;

export type Mbr =
  | { readonly kind: 'mbr'; readonly partitions: readonly Partition[] }
  /** The disk has a GPT, which is what counts; the protective entry says how many sectors there were. */
  | { readonly kind: 'protective'; readonly coveredSectors: number };

/** The four entries, or undefined where these 512 bytes are none. */
function entriesOf(sector: Uint8Array): MbrEntry[] | undefined {
  if (signature.decode(sector, SIGNATURE_AT).value !== SIGNATURE) return undefined;
  return Array.from({ length: ENTRIES }, (_, index) => mbrEntry.decode(sector, TABLE_AT + index * mbrEntry.bytes));
}

/** An extended partition itself holds nothing but its logical ones, and is left out. */
export function readMbr(sector: Uint8Array, diskBytes: number, read: ReadBytes): Mbr {
  const entries = entriesOf(sector);
  // The boot sector of a FAT file system ends like an MBR; its code where the table would be gives it away.
  if (entries?.every((entry) => entry.bootIndicator === 0 || entry.bootIndicator === 0x80) !== true) {
    return { kind: 'mbr', partitions: [] };
  }
  const protective = entries.find((entry) => entry.type === GPT_PROTECTIVE);
  if (protective !== undefined) {
    return { kind: 'protective', coveredSectors: protective.startSector + protective.sectors };
  }
  const partitions: Partition[] = [];
  const add = (number: number, startSector: number, sectors: number): void => {
    const start = startSector * MBR_SECTOR_BYTES;
    const length = Math.min(sectors * MBR_SECTOR_BYTES, diskBytes - start);
    if (length > 0) partitions.push({ number, start, length });
  };
  for (const [index, entry] of entries.entries()) {
    if (entry.sectors !== 0 && !isExtended(entry)) add(index + 1, entry.startSector, entry.sectors);
  }
  let next = FIRST_LOGICAL;
  for (const entry of entries) {
    if (entry.sectors === 0 || !isExtended(entry)) continue;
    for (const logical of readLogical(entry, read, MAX_PARTITIONS + 1 - next)) {
      add(next++, logical.startSector, logical.sectors);
    }
  }
  return { kind: 'mbr', partitions };
}

interface Sectors {
  readonly startSector: number;
  readonly sectors: number;
}

/** Follow the chain of EBRs. Ends at its end, at a damaged record, at one seen before, or after `most` partitions. */
function readLogical(extended: Sectors, read: ReadBytes, most: number): Sectors[] {
  const found: Sectors[] = [];
  const seen = new Set<number>();
  let here: Sectors = extended;
  // An EBR may be empty and only link on: the records are bounded too, not just the partitions.
  while (found.length < most && seen.size < MAX_PARTITIONS && !seen.has(here.startSector)) {
    seen.add(here.startSector);
    const sector = read(here.startSector * MBR_SECTOR_BYTES, MBR_SECTOR_BYTES);
    const entries = sector && entriesOf(sector);
    if (entries === undefined) return found;
    for (const [index, entry] of entries.entries()) {
      if (entry.sectors === 0 || isExtended(entry) || found.length === most) continue;
      const startSector = here.startSector + entry.startSector;
      // Entries 3 and 4 should be unused, and hold garbage on some disks: taken only where they fit.
      const fits =
        entry.startSector + entry.sectors <= here.sectors &&
        startSector >= extended.startSector &&
        startSector + entry.sectors <= extended.startSector + extended.sectors;
      if (index < 2 || fits) found.push({ startSector, sectors: entry.sectors });
    }
    const link = entries.find((entry) => entry.sectors !== 0 && isExtended(entry));
    if (link === undefined) return found;
    here = { startSector: extended.startSector + link.startSector, sectors: link.sectors };
  }
  return found;
}
