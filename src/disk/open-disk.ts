import type { Disk } from './disk.ts';
import { openChain } from './open-chain.ts';
import { OpenedDisk } from './opened-disk.ts';

export interface OpenDiskOptions {
  readonly readOnly: boolean;
  /** Memory for the caches of each image, in bytes. */
  readonly cacheBytes?: number;
}

/** Maps 256 GiB with clusters of 64 KiB. */
export const DEFAULT_CACHE_BYTES = 32 * 2 ** 20;

/**
 * Open the disk of a qcow2 image, with its whole chain, and lock the files.
 * @throws FsError EBUSY if another process has it; ENOENT, EINVAL, ENOTSUP, EIO with a sentence
 */
export async function openDisk(imagePath: string, options: OpenDiskOptions): Promise<Disk> {
  const chain = await openChain(imagePath, {
    readOnly: options.readOnly,
    cacheBytes: options.cacheBytes ?? DEFAULT_CACHE_BYTES,
  });
  return new OpenedDisk(imagePath, chain, options.readOnly);
}
