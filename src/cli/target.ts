/** IMAGE_OR_DISK: what a command changes, either an image file or a disk of a running mount. */
import { existsSync, statSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { FsError } from '../errors.ts';
import { withImage } from './image-target.ts';
import { mountedTarget } from './mounted-target.ts';

export interface TakeOptions {
  /** Leave the memory of a running guest out. An image that is not mounted has no guest. */
  readonly withoutMemory?: boolean;
  /** In an overlay instead of in the image. */
  readonly external?: boolean;
}

export interface DeleteOptions {
  /** Of that name, the external one. */
  readonly external?: boolean;
  /** External: throw away what was written since. */
  readonly discard?: boolean;
  /** Work on an image that is not mounted: how far it has come, and what breaks it off. */
  readonly progress?: (fraction: number) => void;
  readonly signal?: AbortSignal;
}

/** The changes that both kinds take. Each is durable when it resolves. @throws FsError */
export interface Target {
  takeCheckpoint(name: string, options?: TakeOptions): Promise<void>;
  /** @returns what was done, in a sentence */
  deleteCheckpoint(name: string, options?: DeleteOptions): Promise<string>;
  renameCheckpoint(oldName: string, newName: string): Promise<void>;
  rollback(name: string): Promise<void>;
  resize(bytes: number, options: { readonly shrink: boolean }): Promise<void>;
}

/** Run `action` on what `path` names. An image is opened for it and closed after it. */
export async function withTarget(path: string, action: (target: Target) => Promise<void>): Promise<void> {
  const directory = mountedDisk(path);
  if (directory !== undefined) return action(mountedTarget(directory));
  return withImage(path, action);
}

/**
 * The directory of a mounted disk that `path` names, absolute; undefined if it is an image file (or nothing yet).
 * @throws FsError EISDIR for any other directory
 */
export function mountedDisk(path: string): string | undefined {
  if (!statSync(path, { throwIfNoEntry: false })?.isDirectory()) return undefined;
  if (existsSync(join(path, 'control'))) return resolve(path);
  throw new FsError(
    'EISDIR',
    `${path}: a directory, but not one of a mounted disk; give an image file, or a disk's directory such as MOUNT/vm1`,
  );
}

/** For commands that change the files below a disk. @throws FsError EBUSY for a mounted disk */
export function refuseMounted(path: string): void {
  if (mountedDisk(path) === undefined) return;
  throw new FsError('EBUSY', `${path}: a disk of a mount; unmount it and give the image file`);
}
