/** IMAGE_OR_DIR...: which disks a mount shows, and under which names. */
import { readdirSync, realpathSync, statSync } from 'node:fs';
import { basename, dirname, resolve } from 'node:path';
import { FsError } from '../errors.ts';
import { fsErrorFrom } from '../os/errno.ts';
import { readHeader } from '../qcow2/header.ts';
import { HostFile } from '../storage/host-file.ts';

const SUFFIX = '.qcow2';

/** The directory name of the disk in an image file. */
export const diskName = (imagePath: string): string => basename(imagePath, SUFFIX);

/**
 * The image files to mount, absolute, in the order given. A directory stands for the top of each chain in it: a
 * *.qcow2 that another one there has as its backing file is no disk of its own.
 * @throws FsError ENOENT for what is not there, and for a directory without images; EEXIST for two disks of one name
 */
export function imagesToMount(paths: readonly string[]): string[] {
  const images = paths.flatMap((path) => (isDirectory(path) ? topsOf(path) : [resolve(path)]));
  const byName = new Map<string, string>();
  for (const image of images) {
    const name = diskName(image);
    const other = byName.get(name);
    if (other === image) throw new FsError('EEXIST', `${image}: given twice; give each image once`);
    if (other !== undefined) {
      throw new FsError(
        'EEXIST',
        `${other} and ${image}: both would be the disk ${name}; mount them apart, or rename one of the files`,
      );
    }
    byName.set(name, image);
  }
  return images;
}

function isDirectory(path: string): boolean {
  try {
    return statSync(path).isDirectory();
  } catch (error) {
    throw fsErrorFrom(error, `cannot mount ${path}`);
  }
}

function topsOf(directory: string): string[] {
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
  const backing = new Set(images.map(backingPath));
  const tops = images.filter((path) => !backing.has(realpathSync(path)));
  // Only in a circle is there no top; opening any of them says so.
  return tops.length > 0 ? tops : images;
}

/** The real path of an image's backing file; undefined without one, or if that cannot be told: opening will say why. */
function backingPath(path: string): string | undefined {
  try {
    using file = HostFile.open(path, { readOnly: true });
    const name = readHeader(file).backingFile?.replace(/^file:/, '');
    return name === undefined ? undefined : realpathSync(resolve(dirname(realpathSync(path)), name));
  } catch {
    return undefined;
  }
}
