/** Changing the size of the disk (qcow2 specification, header fields size, l1_size, l1_table_offset). */
import { FsError } from '../errors.ts';
import { switchHeader } from './barrier.ts';
import { zeroRange, zeroStill } from './discard.ts';
import { flush } from './flush.ts';
import { limits } from './header.ts';
import { writeDisk } from './header-update.ts';
import type { Image } from './image.ts';
import { number } from './image.ts';
import { freeMetadata, l1EntriesForSize, still, writeNewTable } from './snapshots.ts';

/**
 * Grow the disk: the new bytes read as zeros, also over a longer backing file.
 * @param bytes new virtual size, not below the present one
 * @throws FsError EFBIG, ENOSPC; the disk is as before then
 */
export async function growDisk(image: Image, bytes: number): Promise<void> {
  const { geometry, numbers } = image;
  const entries = l1EntriesForSize(image, bytes);
  if (entries * 8 > limits.L1_BYTES || !Number.isSafeInteger(bytes)) {
    throw new FsError(
      'EFBIG',
      `${image.file.path}: ${bytes} bytes need an L1 table beyond 32 MiB with clusters of ${geometry.clusterBytes} bytes; use larger clusters`,
    );
  }
  await still(image, async () => {
    const before = image.virtualSize();
    if (entries > (numbers[number.L1_ENTRIES] as number)) moveL1(image, entries);
    if (geometry.externalData && image.data.size() < bytes) image.data.truncate(bytes);
    // Zeroing goes as far as the disk does: the size in memory is first, the one in the file last.
    numbers[number.VIRTUAL_SIZE] = bytes;
    try {
      // Old bytes of the last cluster, and of a backing file that is longer than the disk was, must not come to light,
      // not by a crash either.
      const lastClusterEnd = Math.ceil(before / geometry.clusterBytes) * geometry.clusterBytes;
      const hidden = Math.min(bytes, Math.max(image.backing?.size() ?? 0, lastClusterEnd));
      zeroStill(image, before, hidden);
      flush(image);
      storeSize(image, bytes);
    } catch (error) {
      numbers[number.VIRTUAL_SIZE] = before;
      throw error;
    }
  });
}

function storeSize(image: Image, bytes: number): void {
  const { numbers } = image;
  const l1Entries = numbers[number.L1_ENTRIES] as number;
  switchHeader(image, () => writeDisk(image.file, bytes, l1Entries, numbers[number.L1_OFFSET] as number));
}

/** A longer L1 table in fresh clusters, complete before the header switches to it. */
function moveL1(image: Image, entries: number): void {
  const { numbers, l1 } = image;
  const { clusterBytes } = image.geometry;
  const oldEntries = numbers[number.L1_ENTRIES] as number;
  const oldOffset = numbers[number.L1_OFFSET] as number;
  const table = new Uint8Array(entries * 8);
  table.set(new Uint8Array(l1.buffer, l1.byteOffset, oldEntries * 8));
  const { cluster } = writeNewTable(image, table);
  flush(image);
  switchHeader(image, () => writeDisk(image.file, image.virtualSize(), entries, cluster * clusterBytes));
  numbers[number.L1_OFFSET] = cluster * clusterBytes;
  numbers[number.L1_ENTRIES] = entries;
  const oldClusters = Math.ceil((oldEntries * 8) / clusterBytes);
  if (oldClusters > 0 && oldOffset > 0) freeMetadata(image, oldOffset / clusterBytes, oldClusters);
}

/**
 * Shrink the disk: what lies behind `bytes` is discarded. Checkpoints keep their size.
 * @param bytes new virtual size, below the present one
 */
export async function shrinkDisk(image: Image, bytes: number): Promise<void> {
  const { numbers } = image;
  if (!zeroRange(image, bytes, image.virtualSize() - bytes, 'free')) {
    throw new FsError('EBUSY', `${image.file.path}: a checkpoint is being taken; try again`);
  }
  await still(image, async () => {
    storeSize(image, bytes);
    numbers[number.VIRTUAL_SIZE] = bytes;
  });
}
