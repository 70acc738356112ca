/** Opening an image and everything below it: finding the files, locking them, reading their headers. */
import { existsSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { CorruptImage, FsError } from '../errors.ts';
import { rebuildRefcounts } from '../qcow2/check.ts';
import { type Header, readHeader } from '../qcow2/header.ts';
import type { Backing, Image, SharedImage } from '../qcow2/image.ts';
import { imageBacking, rawBacking } from '../qcow2/layer.ts';
import { openImage } from '../qcow2/open-image.ts';
import { isMarked, unmark } from '../qcow2/session-mark.ts';
import { readSnapshotTable, type SnapshotTable } from '../qcow2/snapshot-table.ts';
import { HostFile } from '../storage/host-file.ts';
import { lockImage } from '../storage/image-lock.ts';
import type { SharedChain, SharedLayer } from './chain.ts';

/** QEMU and this program go no deeper: a longer chain is a loop, or unusable. */
const MAX_DEPTH = 200;

export interface OpenChainOptions {
  readonly readOnly: boolean;
  /** Memory for the caches of each image, in bytes. */
  readonly cacheBytes: number;
}

/** One image of an open chain. */
export interface Layer {
  readonly path: string;
  readonly format: 'qcow2' | 'raw';
  readonly file: HostFile;
  readonly virtualSize: number;
}

export interface OpenChain extends Disposable {
  readonly image: Image;
  readonly header: Header;
  readonly snapshots: SnapshotTable;
  /** Top first. */
  readonly layers: readonly Layer[];
  readonly shared: SharedChain;
  /** Why the image cannot be written, although that was asked for; undefined if it can, or was not asked for. */
  readonly unwritable: string | undefined;
}

/**
 * Open `path` for writing, or for reading if that was asked for, or if the image or the file allows no more; what is below it for reading.
 * @throws FsError with nothing left open
 */
export async function openChain(path: string, options: OpenChainOptions): Promise<OpenChain> {
  const opened: HostFile[] = [];
  const close = (): void => {
    for (const file of opened.toReversed()) file[Symbol.dispose]();
  };
  try {
    return { ...(await openLayers(path, options, opened)), [Symbol.dispose]: close };
  } catch (error) {
    close();
    throw error;
  }
}

/** Open a file and note it as one to close. */
function openFile(path: string, readOnly: boolean, opened: HostFile[]): HostFile {
  const file = HostFile.open(path, { readOnly });
  opened.push(file);
  return file;
}

async function openLayers(
  path: string,
  options: OpenChainOptions,
  opened: HostFile[],
): Promise<Omit<OpenChain, typeof Symbol.dispose>> {
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
  const below = openBelow(path, header, opened);
  const snapshots = readSnapshotTable(file, header);
  const data = openDataFile(path, header, canWrite, opened);
  const backing = backingOf(below, options.cacheBytes);
  const top = openImage({
    file,
    data: data ?? file,
    backing: backing.backing,
    header,
    snapshots,
    writable: canWrite,
    cacheBytes: options.cacheBytes,
  });
  const shared: SharedLayer = { format: 'qcow2', file: file.share(), data: data?.share(), image: top.shared };
  return {
    image: top.image,
    header,
    snapshots,
    layers: [{ path, format: 'qcow2', file, virtualSize: header.size }, ...backing.layers],
    shared: [shared, ...backing.shared],
    unwritable,
  };
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
      const cannot = error instanceof FsError && (error.errno === 'EROFS' || error.errno === 'EACCES');
      if (!cannot) throw error;
      const file = openLocked(path, opened);
      return { file, writable: false, reason: `${path} may not be written on the host` };
    }
  }
  return { file: openLocked(path, opened), writable: false, reason: undefined };
}

function openLocked(path: string, opened: HostFile[]): HostFile {
  const file = openFile(path, true, opened);
  lockImage(file.fd, path, 'read');
  return file;
}

function openDataFile(path: string, header: Header, writable: boolean, opened: HostFile[]): HostFile | undefined {
  if (!header.externalDataFile) return undefined;
  if (header.dataFile === undefined) {
    throw new FsError('EINVAL', `${path} needs an external data file but does not name it; its header is damaged`);
  }
  const dataPath = locateData(path, header.dataFile);
  if (!writable) return openLocked(dataPath, opened);
  const data = openFile(dataPath, false, opened);
  lockImage(data.fd, dataPath, 'write');
  return data;
}

interface OpenedBelow {
  readonly path: string;
  readonly file: HostFile;
  readonly data: HostFile | undefined;
  /** Undefined for a raw file. */
  readonly header: Header | undefined;
}

/** Open all backing files, top down. */
function openBelow(path: string, top: Header, opened: HostFile[]): OpenedBelow[] {
  const below: OpenedBelow[] = [];
  let above = { path, header: top };
  const seen = new Set([path]);
  while (above.header.backingFile !== undefined) {
    const backingPath = locate(above.path, above.header.backingFile, 'backing file');
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
    let file: HostFile;
    try {
      file = openLocked(backingPath, opened);
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
    below.push({
      path: backingPath,
      file,
      data: header === undefined ? undefined : openDataFile(backingPath, header, false, opened),
      header,
    });
    if (header === undefined) break;
    above = { path: backingPath, header };
  }
  return below;
}

/** Magic of a qcow2 file: for overlays that do not record the format of their backing file. */
function looksLikeQcow2(file: HostFile): boolean {
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

/** As `locate`; QEMU looks for a relative data file from its working directory, so that comes second. */
function locateData(imagePath: string, name: string): string {
  const beside = locate(imagePath, name, 'external data file');
  const fromHere = resolve(name);
  return !existsSync(beside) && existsSync(fromHere) ? fromHere : beside;
}

/** The images below as one `Backing`, made from the bottom up. */
function backingOf(
  below: readonly OpenedBelow[],
  cacheBytes: number,
): { backing: Backing | undefined; layers: Layer[]; shared: SharedLayer[] } {
  let backing: Backing | undefined;
  const layers: Layer[] = [];
  const shared: SharedLayer[] = [];
  for (const { path, file, data, header } of below.toReversed()) {
    if (header === undefined) {
      backing = rawBacking(file);
      layers.unshift({ path, format: 'raw', file, virtualSize: file.size() });
      shared.unshift({ format: 'raw', file: file.share() });
      continue;
    }
    const snapshots: SnapshotTable = { entries: [], bytes: 0 };
    const opened: { image: Image; shared: SharedImage } = openImage({
      file,
      data: data ?? file,
      backing,
      header,
      snapshots,
      writable: false,
      cacheBytes,
    });
    backing = imageBacking(opened.image);
    layers.unshift({ path, format: 'qcow2', file, virtualSize: header.size });
    shared.unshift({ format: 'qcow2', file: file.share(), data: data?.share(), image: opened.shared });
  }
  return { backing, layers, shared };
}
