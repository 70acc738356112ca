/**
 * What a process that died in the middle of a change of names left behind: each overlay says in its mark what was being
 * done to it, and the next one who opens the disk for writing does the rest, or takes it back. Nothing here moves data; a
 * merge that has not come to its end goes on when the overlay is deleted again.
 */
import { readdir, unlink } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { FsError } from '../errors.ts';
import { readHeader } from '../qcow2/header.ts';
import { writeBacking } from '../qcow2/header-update.ts';
import { HostFile } from '../storage/host-file.ts';
import { lockImage } from '../storage/image-lock.ts';
import { bottomOf, type FolderScan, type FoundImage } from './folder-scan.ts';
import { recordedName } from './overlay.ts';
import {
  addName,
  diskNameOf,
  freeUnnamedPath,
  isAbandoned,
  removeOverlayFiles,
  renameStateFiles,
  replaceName,
  secondName,
  unlinkDurably,
} from './overlay-files.ts';
import { type OverlayMark, overlaysElsewhere, rememberOverlays, writeMark } from './overlay-mark.ts';

/**
 * Mend what is in the folders of an image and in others.
 * @returns whether anything was changed: a scan that was made before is out of date then
 * @throws FsError EROFS where something must be mended before the image can be used, and nothing may be written
 */
export async function mendOverlays(
  scan: FolderScan,
  path: string,
  folders: readonly string[],
  { readOnly }: { readonly readOnly: boolean },
): Promise<boolean> {
  const bottom = await bottomOf(scan, path);
  const images = new Map<string, FoundImage>();
  const look = async (folder: string): Promise<void> => {
    for (const image of await scan.folder(folder)) images.set(image.path, image);
  };
  for (const folder of new Set([dirname(bottom), dirname(path), ...folders])) {
    if (!readOnly) await removeAbandoned(folder);
    await look(folder);
  }
  for (const { header } of [...images.values()]) {
    for (const folder of new Set(overlaysElsewhere(header).map((other) => dirname(other)))) await look(folder);
  }
  let changed = false;
  for (const image of images.values()) {
    const mend = await mendingOf(scan, image, [...images.values()]);
    if (mend === undefined) continue;
    if (readOnly) {
      if (!mend.needed) continue;
      throw new FsError(
        'EROFS',
        `${image.path} was being merged into ${image.mark?.takesName} when a process died: open it once for writing, which finishes that`,
      );
    }
    changed = runLocked(image.path, mend.run) || changed;
    // One at a time: what was found before is out of date now.
    if (changed) return true;
  }
  return changed;
}

/** Overlays that were never finished; nothing stands on them. */
async function removeAbandoned(folder: string): Promise<void> {
  for (const name of await readdir(folder).catch(() => [])) {
    if (isAbandoned(name)) await unlink(join(folder, name)).catch(() => {});
  }
}

interface Mending {
  /** Until then the file of another name holds what is out of date. */
  readonly needed: boolean;
  readonly run: (file: HostFile) => void;
}

/** Undefined where there is nothing to do. */
async function mendingOf(
  scan: FolderScan,
  image: FoundImage,
  images: readonly FoundImage[],
): Promise<Mending | undefined> {
  const { mark, path, header, backing } = image;
  if (mark === undefined) return undefined;
  const above = (names: readonly string[]): FoundImage[] =>
    images.filter((other) => other.backing !== undefined && names.includes(other.backing));
  if (mark.takesName !== '' && basename(mark.takesName) === mark.takesName) {
    const target = join(dirname(path), mark.takesName);
    const there = await scan.image(target);
    const folder = dirname(path);
    const names = images
      .filter((other) => other.inode === image.inode && dirname(other.path) === folder)
      .map((other) => other.path);
    const second = secondName(target);
    // Looked at under its own name.
    if (path === second && names.length > 1) return undefined;
    const others = names.filter((name) => name !== target);
    const same = there?.inode === image.inode;
    const done = mark.merging
      ? { ...mark, merging: false, takesName: '', bottom: mark.becomesBottom }
      : { ...mark, takesName: '' };
    const finish = (file: HostFile): void => {
      for (const other of above(others)) relink(other, target);
      for (const other of others) {
        if (!mark.merging) renameStateFiles(other, target);
        removeOverlayFiles(other);
      }
      writeMark(file, done);
    };
    if (same) return { needed: false, run: finish };
    if (!mark.merging) return { needed: false, run: (file) => writeMark(file, done) };
    // It stands on the other file until it comes in its place; that one knows, whatever this one claims.
    const standsOnIt = backing === undefined ? header.backingFile !== undefined : backing === target;
    if (standsOnIt || there === undefined || !overlaysElsewhere(there.header).includes(path)) {
      return names.includes(second) ? { needed: false, run: () => unlinkDurably(second) } : undefined;
    }
    return {
      needed: true,
      run: (file) => {
        if (names.includes(second)) unlinkDurably(second);
        addName(path, second);
        replaceName(second, target);
        finish(file);
      },
    };
  }
  if (mark.merging) {
    // All of it is below, and those above have begun to stand there.
    const moved = images.some((other) => other !== image && other.mark !== undefined && other.backing === backing);
    if (!moved || backing === undefined) return undefined;
    const run = (): void => {
      for (const other of above([path])) relink(other, backing);
      forget(backing, path);
      removeOverlayFiles(path);
    };
    return { needed: false, run };
  }
  if (!mark.pending) return undefined;
  const disk = diskNameOf(await bottomOf(scan, path));
  return { needed: false, run: (file) => takeBack(file, image, disk, mark, above([path]).length === 0) };
}

/** A checkpoint that was never complete: its overlay goes, or, with what was written to it, becomes a layer without name. */
function takeBack(file: HostFile, image: FoundImage, disk: string, mark: OverlayMark, isEnd: boolean): void {
  const { path, header, backing } = image;
  const l1 = new Uint8Array(header.l1Entries * 8);
  file.read(l1, 0, l1.length, header.l1TableOffset);
  if (isEnd && backing !== undefined && l1.every((byte) => byte === 0)) {
    forget(backing, path);
    removeOverlayFiles(path);
    return;
  }
  if (!isEnd || backing === undefined) {
    writeMark(file, { ...mark, pending: false });
    return;
  }
  const unnamed = freeUnnamedPath(dirname(path), disk);
  remember(backing, path, unnamed);
  addName(path, unnamed);
  writeMark(file, { ...mark, pending: false });
  forget(backing, path);
  removeOverlayFiles(path);
}

function relink({ path }: FoundImage, below: string): void {
  using file = HostFile.open(path, { readOnly: false });
  writeBacking(file, { file: recordedName(path, below), format: 'qcow2' });
}

/** An image below remembers overlays in other folders. */
function remember(below: string, path: string, alsoPath: string): void {
  using file = HostFile.open(below, { readOnly: false });
  const known = overlaysElsewhere(readHeader(file));
  if (known.includes(path)) rememberOverlays(file, [...known, alsoPath]);
}

function forget(below: string, path: string): void {
  using file = HostFile.open(below, { readOnly: false });
  const known = overlaysElsewhere(readHeader(file));
  if (known.includes(path)) {
    rememberOverlays(
      file,
      known.filter((other) => other !== path),
    );
  }
}

/** @returns false if another process has the overlay: then nothing was left behind, it is at work */
function runLocked(path: string, action: (file: HostFile) => void): boolean {
  try {
    using file = HostFile.open(path, { readOnly: false });
    lockImage(file.fd, path, 'write');
    action(file);
    return true;
  } catch (error) {
    if (error instanceof FsError && ['EBUSY', 'EACCES', 'EROFS'].includes(error.errno)) return false;
    throw error;
  }
}
