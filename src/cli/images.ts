/** IMAGE_OR_DIR...: which disks a mount shows, and under which names. */
import { readdirSync, statSync } from 'node:fs';
import { basename, resolve } from 'node:path';
import { bottomOf, discoverDisk, FolderScan } from '../disk/folder-scan.ts';
import { FsError } from '../errors.ts';
import { fsErrorFrom } from '../os/errno.ts';

const SUFFIX = '.qcow2';

/** The directory name of the disk in an image file. */
export const diskName = (imagePath: string): string => basename(imagePath, SUFFIX);

/** A disk to mount. */
export interface SourceDisk {
  /** What to open: its image, or one of the overlays over it. */
  readonly image: string;
  readonly name: string;
}

/**
 * The disks to mount, in the order given. An overlay of this program stands for the disk that it belongs to. A directory
 * stands for the disks in it: a disk whose
 * live image another one there has as its backing file is no disk of its own.
 * @throws FsError ENOENT for what is not there, and for a directory without images; EEXIST for two disks of one name
 */
export async function disksToMount(paths: readonly string[]): Promise<SourceDisk[]> {
  const scan = new FolderScan();
  const disks: (SourceDisk & { readonly bottom: string })[] = [];
  for (const path of paths) {
    const found = isDirectory(path) ? await disksIn(scan, path) : [await sourceDisk(scan, resolve(path))];
    for (const disk of found) {
      if (disks.some(({ image }) => image === disk.image)) {
        throw new FsError('EEXIST', `${disk.image}: given twice; give each image once`);
      }
      // The image and an overlay over it: one disk.
      if (disks.some(({ bottom }) => bottom === disk.bottom)) continue;
      const other = disks.find(({ name }) => name === disk.name);
      if (other !== undefined) {
        throw new FsError(
          'EEXIST',
          `${other.image} and ${disk.image}: both would be the disk ${disk.name}; mount them apart, or rename one of the files`,
        );
      }
      disks.push(disk);
    }
  }
  return disks.map(({ image, name }) => ({ image, name }));
}

async function sourceDisk(scan: FolderScan, image: string): Promise<SourceDisk & { readonly bottom: string }> {
  const bottom = await bottomOf(scan, image);
  // The name given, where it is a link to the image.
  const own = (await scan.image(image))?.path ?? image;
  return { image, bottom, name: diskName(bottom === own ? image : bottom) };
}

function isDirectory(path: string): boolean {
  try {
    return statSync(path).isDirectory();
  } catch (error) {
    throw fsErrorFrom(error, `cannot mount ${path}`);
  }
}

async function disksIn(scan: FolderScan, directory: string): Promise<(SourceDisk & { readonly bottom: string })[]> {
  const images = readdirSync(directory)
    .filter((name) => name.endsWith(SUFFIX) && name !== SUFFIX)
    .sort()
    .map((name) => resolve(directory, name))
    .filter((path) => statSync(path, { throwIfNoEntry: false })?.isFile());
  if (images.length === 0) {
    throw new FsError(
      'ENOENT',
      `${directory}: holds no *${SUFFIX} file; give a directory with images, or the image files`,
    );
  }
  const disks = new Map<string, SourceDisk & { readonly bottom: string }>();
  /** What images of others are built on. */
  const backings = new Set<string>();
  for (const path of images) {
    const disk = await sourceDisk(scan, path);
    const image = await scan.image(path);
    if (image?.mark === undefined && image?.backing !== undefined) backings.add(image.backing);
    // The image itself stands for the disk before its overlays.
    if (!disks.has(disk.bottom) || image?.path === disk.bottom) disks.set(disk.bottom, disk);
  }
  const tops: (SourceDisk & { readonly bottom: string })[] = [];
  for (const disk of disks.values()) {
    // A clone of one of its checkpoints does not take a disk's place: it goes on in another file.
    const { active } = await discoverDisk(scan, disk.image, []);
    if (!backings.has(active)) tops.push(disk);
  }
  // Only in a circle is there no top; opening any of them says so.
  return tops.length > 0 ? tops : [...disks.values()];
}
