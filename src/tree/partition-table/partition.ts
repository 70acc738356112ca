/** What the decoders of partition tables share. */

export interface Partition {
  /** As in /dev/sdaN: GPT entry + 1; MBR primaries 1 to 4, logical ones from 5. */
  readonly number: number;
  /** Bytes from the start of the disk. */
  readonly start: number;
  readonly length: number;
}

/** The bytes at `offset`; undefined where the disk does not have them all. Offsets are checked here, nowhere else. */
export type ReadBytes = (offset: number, length: number) => Uint8Array | undefined;

/** Size of an MBR, and of the sectors it counts in. */
export const MBR_SECTOR_BYTES = 512;

/** Linux's limit (DISK_MAX_PARTS) less one for the whole disk; bounds what a hostile table can make us keep. */
export const MAX_PARTITIONS = 255;
