/** The files of overlays: how they are named, what lies beside them, and how names change so that a crash costs none. */
import {
  closeSync,
  existsSync,
  fsyncSync,
  linkSync,
  lstatSync,
  openSync,
  renameSync,
  statSync,
  unlinkSync,
} from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { FsError } from '../errors.ts';
import { fsErrorFrom } from '../os/errno.ts';
import { NAME_BYTES, validateNewName } from './checkpoint-name.ts';
import type { StateFileEntry } from './disk.ts';

const SUFFIX = '.qcow2';

/** A guest's state beside its overlay, in the order of the listing: `NAME.qcow2.state` and so on. */
export const STATE_NAMES = ['state', 'state.kern', 'state.meta'] as const;

const LONGEST_SUFFIX = `${SUFFIX}.state.kern`;

/** The name of a disk: its image's file name without .qcow2. */
export const diskNameOf = (path: string): string => basename(path).replace(/\.qcow2$/, '');

export const stateFileOf = (overlayPath: string, name: string): string => `${overlayPath}.${name}`;

/** @throws FsError EINVAL, ENAMETOOLONG where NAME.qcow2.state.kern could be no file name */
export function validateOverlayName(name: string): void {
  validateNewName(name);
  checkLength(name, name);
}

function checkLength(stem: string, name: string): void {
  const bytes = Buffer.byteLength(stem + LONGEST_SUFFIX);
  if (bytes <= NAME_BYTES) return;
  throw new FsError(
    'ENAMETOOLONG',
    `An overlay cannot be named '${name.slice(0, 40)}…': the files that belong to it would have names of ${bytes} bytes, ${NAME_BYTES} are possible`,
  );
}

/**
 * The checkpoint's name by its file: NAME.qcow2, or DISK~NAME.qcow2 where the plain name was taken by something else.
 * Undefined for a layer that is no checkpoint: DISK~~NUMBER.qcow2.
 */
export function pointNameOf(disk: string, fileName: string): string | undefined {
  const stem = diskNameOf(fileName);
  if (!stem.startsWith(`${disk}~`)) return stem;
  const rest = stem.slice(disk.length + 1);
  return isUnnamed(rest) || rest === '' ? undefined : rest;
}

const isUnnamed = (rest: string): boolean => /^~\d+$/.test(rest);

/**
 * Where the overlay of a checkpoint goes: a path at which nothing is, nor at those of its state files.
 * @throws FsError EEXIST, ENAMETOOLONG
 */
export function freeOverlayPath(folder: string, disk: string, name: string): string {
  const stems = [...(name.startsWith(`${disk}~`) ? [] : [name]), ...(isUnnamed(name) ? [] : [`${disk}~${name}`])];
  for (const stem of stems) {
    checkLength(stem, name);
    const path = join(folder, stem + SUFFIX);
    if (isFree(path)) return path;
  }
  throw new FsError('EEXIST', `${folder} has files named '${name}${SUFFIX}' already; choose another name`);
}

/** As `freeOverlayPath`, for a layer that is no checkpoint. */
export function freeUnnamedPath(folder: string, disk: string): string {
  for (let number = 1; ; number++) {
    const path = join(folder, `${disk}~~${number}${SUFFIX}`);
    if (isFree(path)) return path;
  }
}

const isFree = (path: string): boolean =>
  [path, ...STATE_NAMES.map((name) => stateFileOf(path, name))].every(
    (file) => lstatSync(file, { throwIfNoEntry: false }) === undefined,
  );

/** The state files that an overlay has. */
export function stateFilesOf(overlayPath: string): StateFileEntry[] {
  return STATE_NAMES.flatMap((name) => {
    const stat = statSync(stateFileOf(overlayPath, name), { throwIfNoEntry: false });
    return stat?.isFile() ? [{ name, bytes: stat.size, allocatedBytes: Math.min(stat.size, stat.blocks * 512) }] : [];
  });
}

/** Make the names in the folder durable. */
export function syncFolder(folder: string): void {
  const fd = openSync(folder, 'r');
  try {
    fsyncSync(fd);
  } catch (error) {
    throw fsErrorFrom(error, `cannot flush the folder '${folder}'`);
  } finally {
    closeSync(fd);
  }
}

/** Remove an overlay's name and its state files, durably. What is not there is no failure. */
export function removeOverlayFiles(path: string): void {
  for (const file of [...STATE_NAMES.map((name) => stateFileOf(path, name)), path]) {
    try {
      unlinkSync(file);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw fsErrorFrom(error, `cannot remove '${file}'`);
    }
  }
  syncFolder(dirname(path));
}

/** Remove a name, durably. */
export function unlinkDurably(path: string): void {
  try {
    unlinkSync(path);
  } catch (error) {
    throw fsErrorFrom(error, `cannot remove '${path}'`);
  }
  syncFolder(dirname(path));
}

/** What a file is called for a moment, before it takes the name of another. */
export const secondName = (path: string): string => `${path}.merged`;

const TEMPORARY = /^\.vdskfs-(\d+)-\d+\.new$/;
let lastTemporary = 0;

/** Where an overlay is made, before it gets its name. */
export const temporaryPath = (folder: string): string => join(folder, `.vdskfs-${process.pid}-${++lastTemporary}.new`);

/** A file that a process was making when it died. In this process making one is over before anything else runs. */
export function isAbandoned(fileName: string): boolean {
  const pid = Number(TEMPORARY.exec(fileName)?.[1] ?? 0);
  if (pid === 0 || pid === process.pid) return pid !== 0;
  try {
    process.kill(pid, 0);
    return false;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'ESRCH';
  }
}

/** Give a new file its name, which nothing has. Durable. @throws FsError EEXIST */
export function placeNew(temporary: string, path: string): void {
  try {
    addName(temporary, path);
  } catch (error) {
    if (!(error instanceof FsError && error.errno === 'ENOTSUP')) throw error;
    // Without hard links: between the look and the renaming nothing of ours can come.
    if (lstatSync(path, { throwIfNoEntry: false }) !== undefined) {
      throw new FsError('EEXIST', `'${path}' exists already`);
    }
    replaceName(temporary, path);
    return;
  }
  unlinkDurably(temporary);
}

/** Give a file a second name, durably. @throws FsError EEXIST; ENOTSUP where the host's file system has no hard links */
export function addName(path: string, newPath: string): void {
  try {
    linkSync(path, newPath);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'EPERM' || code === 'ENOTSUP' || code === 'EOPNOTSUPP' || code === 'EMLINK' || code === 'ENOSYS') {
      throw new FsError(
        'ENOTSUP',
        `'${path}' cannot have a second name for the moment of a change: its file system has no hard links`,
        { cause: error },
      );
    }
    throw fsErrorFrom(error, `cannot name '${path}' '${newPath}'`);
  }
  syncFolder(dirname(newPath));
}

/** Let `path` lead to the file at `from` from now on, at one instant, durably. */
export function replaceName(from: string, path: string): void {
  try {
    renameSync(from, path);
  } catch (error) {
    throw fsErrorFrom(error, `cannot give '${from}' the name '${path}'`);
  }
  syncFolder(dirname(path));
}

/** Rename the state files of an overlay, those that are there. Durable. */
export function renameStateFiles(path: string, newPath: string): void {
  for (const name of STATE_NAMES) {
    const from = stateFileOf(path, name);
    if (!existsSync(from)) continue;
    try {
      renameSync(from, stateFileOf(newPath, name));
    } catch (error) {
      throw fsErrorFrom(error, `cannot rename '${from}'`);
    }
  }
  syncFolder(dirname(newPath));
}
