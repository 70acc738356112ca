/** Opening an image and everything below it: finding the files, locking them, reading their headers. */
import { existsSync, realpathSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { CorruptImage, FsError } from '../errors.ts';
import { rebuildRefcounts } from '../qcow2/check.ts';
import { type Header, readHeader } from '../qcow2/header.ts';
import { snapshotList } from '../qcow2/open-image.ts';
import { isMarked, unmark } from '../qcow2/session-mark.ts';
import { readSnapshotTable } from '../qcow2/snapshot-table.ts';
import type { SnapshotList } from '../qcow2/snapshots.ts';
import { HostFile } from '../storage/host-file.ts';
import { lockImage } from '../storage/image-lock.ts';
import { Layer, loadImage } from './layer.ts';

/** Backing files of one image. QEMU and this program go no deeper: a longer chain is a loop, or unusable. */
export const MAX_DEPTH = 200;

export interface OpenChainOptions {
  readonly readOnly: boolean;
  /** Memory for the caches of each image, in bytes. */
  readonly cacheBytes: number;
  /** Layers that are open already, by path: a branch shares them with the chain that was opened first. */
  readonly known?: ReadonlyMap<string, Layer>;
  /** Layers below the top that a merge may write one day: opened for it, locked as the others. By path without links. */
  readonly mayWrite?: ReadonlySet<string>;
  /** Take no locks: the guest's own process has the image open for writing, and here it is only read. */
  readonly unlocked?: boolean;
}

export interface OpenChain {
  /** The top layer, with all others below it. */
  readonly top: Layer;
  /** Why the image cannot be written, although that was asked for; undefined if it can, or was not asked for. */
  readonly unwritable: string | undefined;
}

/**
 * Open `path` for writing, or for reading if that was asked for, or if the image or the file allows no more; what is below it for reading.
 * Whoever calls disposes of the layers.
 * @throws FsError with nothing left open
 */
export async function openChain(path: string, options: OpenChainOptions): Promise<OpenChain> {
  const opened: HostFile[] = [];
  try {
    return openLayers(path, options, opened);
  } catch (error) {
    for (const file of opened.toReversed()) file[Symbol.dispose]();
    throw error;
  }
}

/**
 * Open what may be a backing file, a qcow2 image with all below it or a raw file, for reading.
 * @throws FsError with nothing left open
 */
export async function openBacking(path: string, cacheBytes: number): Promise<Layer> {
  const file = HostFile.open(path, { readOnly: true });
  try {
    if (!looksLikeQcow2(file)) {
      lockImage(file.fd, path, 'read');
      return new Layer({ path, file }, undefined, undefined);
    }
  } catch (error) {
    file[Symbol.dispose]();
    throw error;
  }
  file[Symbol.dispose]();
  return (await openChain(path, { readOnly: true, cacheBytes })).top;
}

/** Open a file and note it as one to close. */
function openFile(path: string, readOnly: boolean, opened: HostFile[]): HostFile {
  const file = HostFile.open(path, { readOnly });
  opened.push(file);
  return file;
}

function openLayers(path: string, options: OpenChainOptions, opened: HostFile[]): OpenChain {
  const { file, writable, reason } = openTop(path, options, opened);
  let header = readHeader(file);
  let unwritable = reason;
  let canWrite = writable;
  if (canWrite && header.corrupt) {
    canWrite = false;
    unwritable = `${path} is marked corrupt; run vdskfs check --repair all on it`;
  }
  if (canWrite && isMarked(header)) {
    try {
      rebuildRefcounts(file, header);
      unmark(file);
      header = readHeader(file);
    } catch (error) {
      if (!(error instanceof CorruptImage)) throw error;
      canWrite = false;
      unwritable = error.message;
    }
  }
  const below = openBelow(path, header, options, opened);
  const snapshots = snapshotList(header, readSnapshotTable(file, header));
  const data = openDataFile(path, header, canWrite, options, opened);
  const { cacheBytes } = options;
  const image = loadImage({ path, file, data }, header, snapshots, { writable: canWrite, cacheBytes });
  return { top: new Layer({ path, file, data }, image, below), unwritable };
}

/** The active image: for writing where possible. */
function openTop(
  path: string,
  options: OpenChainOptions,
  opened: HostFile[],
): { file: HostFile; writable: boolean; reason: string | undefined } {
  if (!options.readOnly) {
    try {
      const file = openFile(path, false, opened);
      lockImage(file.fd, path, 'write');
      return { file, writable: true, reason: undefined };
    } catch (error) {
      if (!isForbidden(error)) throw error;
      const file = openLocked(path, options, opened);
      return { file, writable: false, reason: `${path} may not be written on the host` };
    }
  }
  return { file: openLocked(path, options, opened), writable: false, reason: undefined };
}

/** For reading, locked as a backing file; the descriptor can write where that is wanted and possible. */
function openLocked(path: string, options: OpenChainOptions, opened: HostFile[]): HostFile {
  const mayWrite = options.mayWrite?.has(path) === true;
  let file: HostFile;
  try {
    file = openFile(path, !mayWrite, opened);
  } catch (error) {
    if (!mayWrite || !isForbidden(error)) throw error;
    file = openFile(path, true, opened);
  }
  if (options.unlocked !== true) lockImage(file.fd, path, 'read');
  return file;
}

const isForbidden = (error: unknown): boolean =>
  error instanceof FsError && (error.errno === 'EROFS' || error.errno === 'EACCES');

/** Two names of one file are one layer. What is not there keeps its name: opening it will say so. */
function withoutLinks(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return path;
  }
}

function openDataFile(
  path: string,
  header: Header,
  writable: boolean,
  options: OpenChainOptions,
  opened: HostFile[],
): HostFile | undefined {
  if (!header.externalDataFile) return undefined;
  if (header.dataFile === undefined) {
    throw new FsError('EINVAL', `${path} needs an external data file but does not name it; its header is damaged`);
  }
  const dataPath = locateData(path, header.dataFile);
  if (!writable) return openLocked(dataPath, options, opened);
  const data = openFile(dataPath, false, opened);
  lockImage(data.fd, dataPath, 'write');
  return data;
}

/** Open all backing files. @returns the first of them, with the others below it */
function openBelow(path: string, top: Header, options: OpenChainOptions, opened: HostFile[]): Layer | undefined {
  const found: { readonly path: string; readonly file: HostFile; readonly header: Header | undefined }[] = [];
  let above = { path, header: top };
  let bottom: Layer | undefined;
  const seen = new Set([withoutLinks(path)]);
  while (above.header.backingFile !== undefined) {
    const backingPath = withoutLinks(locate(above.path, above.header.backingFile, 'backing file'));
    if (seen.has(backingPath)) {
      throw new FsError(
        'EINVAL',
        `${above.path}: its backing file '${backingPath}' is above it in the same chain, which is a loop`,
      );
    }
    if (seen.size > MAX_DEPTH) {
      throw new FsError(
        'EINVAL',
        `${path}: the chain of backing files is deeper than ${MAX_DEPTH}; merge some of them first`,
      );
    }
    seen.add(backingPath);
    bottom = options.known?.get(backingPath);
    if (bottom !== undefined) break;
    let file: HostFile;
    try {
      file = openLocked(backingPath, options, opened);
    } catch (error) {
      const { errno, message } = error instanceof FsError ? error : { errno: 'EIO' as const, message: String(error) };
      throw new FsError(errno, `${above.path}: its backing file cannot be used: ${message}`, { cause: error });
    }
    const format = above.header.backingFormat ?? (looksLikeQcow2(file) ? 'qcow2' : 'raw');
    if (format !== 'qcow2' && format !== 'raw') {
      throw new FsError(
        'ENOTSUP',
        `${above.path}: its backing file '${backingPath}' has the format ${format}; qcow2 and raw are supported`,
      );
    }
    const header = format === 'qcow2' ? readHeader(file) : undefined;
    found.push({ path: backingPath, file, header });
    if (header === undefined) break;
    above = { path: backingPath, header };
  }
  // From the bottom up: each stands on the one before.
  return found.toReversed().reduce<Layer | undefined>((below, { path: layerPath, file, header }) => {
    if (header === undefined) return new Layer({ path: layerPath, file }, undefined, below);
    const data = openDataFile(layerPath, header, false, options, opened);
    const { cacheBytes } = options;
    const image = loadImage({ path: layerPath, file, data }, header, snapshotsBelow(file, header), {
      writable: false,
      cacheBytes,
    });
    return new Layer({ path: layerPath, file, data }, image, below);
  }, bottom);
}

/** A damaged list costs only the snapshots of a layer that is not the live one: its disk is read all the same. */
function snapshotsBelow(file: HostFile, header: Header): SnapshotList {
  try {
    return snapshotList(header, readSnapshotTable(file, header));
  } catch (error) {
    if (!(error instanceof CorruptImage)) throw error;
    return { entries: [], tableOffset: 0, tableBytes: 0 };
  }
}

/** Magic of a qcow2 file: for overlays that do not record the format of their backing file. */
export function looksLikeQcow2(file: HostFile): boolean {
  const magic = new Uint8Array(4);
  file.read(magic, 0, 4, 0);
  return magic[0] === 0x51 && magic[1] === 0x46 && magic[2] === 0x49 && magic[3] === 0xfb;
}

/** The host path of a name found in an image: relative to the image's folder, `file:` taken off. */
function locate(imagePath: string, name: string, what: string): string {
  const plain = name.startsWith('file:') ? name.slice('file:'.length) : name;
  if (plain.startsWith('json:') || /^[a-z][a-z0-9+.-]*:/i.test(plain)) {
    throw new FsError(
      'ENOTSUP',
      `${imagePath}: its ${what} '${name}' is not a plain file name; only files of this host are supported`,
    );
  }
  return resolve(dirname(imagePath), plain);
}

/** Absolute path of the backing file that an image names. @throws FsError ENOTSUP for what is no plain file name */
export const locateBacking = (imagePath: string, name: string): string => locate(imagePath, name, 'backing file');

/** As `locate`; QEMU looks for a relative data file from its working directory, so that comes second. */
function locateData(imagePath: string, name: string): string {
  const beside = locate(imagePath, name, 'external data file');
  const fromHere = resolve(name);
  return !existsSync(beside) && existsSync(fromHere) ? fromHere : beside;
}
