/** A file that appears under its name when it is complete, or not at all. */
import { linkSync, lstatSync, renameSync, unlinkSync } from 'node:fs';
import { basename, dirname, join, resolve } from 'node:path';
import { FsError } from '../errors.ts';
import { codeOf, fsErrorFrom } from '../os/errno.ts';
import { syncDirectory } from './directory.ts';
import { HostFile } from './host-file.ts';

/**
 * Make `path`: `write` fills a file beside it, which then gets the name. Whatever fails, and where `write` is
 * interrupted by an error, nothing is left. An existing file is never touched.
 * @throws FsError EEXIST, ENOENT, EACCES, ENOSPC …, and what `write` throws
 */
export async function writeNewFile(path: string, write: (file: HostFile) => Promise<void>): Promise<void> {
  const target = resolve(path);
  refuseExisting(path);
  const partial = join(dirname(target), `.${basename(target)}.${process.pid}.partial`);
  const file = HostFile.open(partial, { readOnly: false, create: 'new' });
  try {
    try {
      await write(file);
      file.flush();
    } finally {
      file[Symbol.dispose]();
    }
    giveName(partial, target, path);
  } catch (error) {
    unlinkSync(partial);
    throw error;
  }
  syncDirectory(dirname(target));
}

function refuseExisting(path: string): void {
  if (lstatSync(path, { throwIfNoEntry: false }) === undefined) return;
  throw new FsError('EEXIST', `${path}: exists already and is not overwritten; remove it, or give another name`);
}

/** link(2) never replaces a file that came to be meanwhile; where it is not supported, a last look must do. */
function giveName(partial: string, target: string, path: string): void {
  try {
    linkSync(partial, target);
    unlinkSync(partial);
  } catch (error) {
    const code = codeOf(error);
    if (code !== 'EPERM' && code !== 'EOPNOTSUPP' && code !== 'ENOTSUP' && code !== 'ENOSYS' && code !== 'EMLINK') {
      if (code === 'EEXIST') refuseExisting(path);
      throw fsErrorFrom(error, `cannot give '${path}' its name`);
    }
    refuseExisting(path);
    renameSync(partial, target);
  }
}
