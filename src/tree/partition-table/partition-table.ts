/** The partitions of a disk, whichever table it has. */
import { readGpt } from './gpt.ts';
import { readMbr } from './mbr.ts';
import { MBR_SECTOR_BYTES, type Partition, type ReadBytes } from './partition.ts';

/**
 * Read the table anew. A disk without one, or with a damaged one that has no good copy, has no partitions.
 * @param diskBytes size of the disk
 */
export function readPartitions(diskBytes: number, read: ReadBytes): readonly Partition[] {
  const sector = read(0, MBR_SECTOR_BYTES);
  if (sector === undefined) return [];
  const mbr = readMbr(sector, diskBytes, read);
  return mbr.kind === 'protective' ? readGpt(diskBytes, mbr.coveredSectors, read) : mbr.partitions;
}
