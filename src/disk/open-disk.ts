import type { Disk } from './disk.ts';
import { LayerTree, type TreeOptions } from './layer-tree.ts';
import { OpenedDisk } from './opened-disk.ts';

export interface OpenDiskOptions extends Omit<TreeOptions, 'cacheBytes'> {
  /** Memory for the caches of each image, in bytes. */
  readonly cacheBytes?: number;
}

/** Maps 256 GiB with clusters of 64 KiB. */
export const DEFAULT_CACHE_BYTES = 32 * 2 ** 20;

/**
 * Open the disk that an image belongs to, with its whole chain and its overlays, and lock the files.
 * @throws FsError EBUSY if another process has it; ENOENT, EINVAL, ENOTSUP, EIO with a sentence
 */
export async function openDisk(imagePath: string, options: OpenDiskOptions): Promise<Disk> {
  return new OpenedDisk(await LayerTree.open(imagePath, { cacheBytes: DEFAULT_CACHE_BYTES, ...options }));
}
