/** What a thin export stands on: a file that holds the earlier checkpoint. */
import { existsSync, realpathSync } from 'node:fs';
import { basename, dirname, join, resolve } from 'node:path';
import { FsError } from '../errors.ts';
import { readHeader } from '../qcow2/header.ts';
import { HostFile } from '../storage/host-file.ts';
import { haveSameContents } from './compare-contents.ts';
import { LayerContents } from './contents.ts';
import type { Source } from './copy-out.ts';
import type { Work } from './disk.ts';
import { type ExportOrigin, isFrom } from './export-origin.ts';
import { FolderScan } from './folder-scan.ts';
import { locateBacking, looksLikeQcow2, openBacking } from './open-chain.ts';
import { recordedName } from './overlay.ts';

export interface ExportBacking {
  /** As it is to be recorded. */
  readonly file: string;
  readonly format: 'qcow2' | 'raw';
  /** It is there, and was found to hold the checkpoint. */
  readonly exists: boolean;
}

export interface EarlierCheckpoint {
  readonly origin: ExportOrigin;
  /** The overlay that was made for it, for an external one: the file below it holds the checkpoint. */
  readonly overlay: string | undefined;
  readonly contents: Source;
}

const CACHE_BYTES = 4 * 2 ** 20;

/**
 * In this order: the file given; what the overlay of an external checkpoint stands on; an export of that checkpoint in
 * the folder of the new file; NAME.qcow2 there, also where it is still to be made.
 * @throws FsError EINVAL if a file that should hold the checkpoint holds something else
 */
export async function exportBacking(
  newFile: string,
  earlier: EarlierCheckpoint,
  given: string | undefined,
  work: Work,
): Promise<ExportBacking> {
  const folder = realpathSync(dirname(resolve(newFile)));
  const target = join(folder, basename(newFile));
  if (given !== undefined) {
    const beside = resolve(folder, given);
    return verified(target, existsSync(beside) ? beside : resolve(given), earlier, work);
  }
  if (earlier.overlay !== undefined) {
    return { ...recorded(target, realpathSync(backingOfOverlay(earlier.overlay))), exists: true };
  }
  const found = (await new FolderScan().folder(folder)).find(({ header }) => isFrom(header, earlier.origin));
  if (found !== undefined) return { ...recorded(target, found.path), exists: true };
  const stem = join(folder, earlier.origin.name.replaceAll('/', '∕'));
  for (const path of [`${stem}.qcow2`, `${stem}.raw`]) {
    if (existsSync(path)) return verified(target, path, earlier, work);
  }
  if (target === `${stem}.qcow2`) {
    throw new FsError(
      'EINVAL',
      `${newFile}: is the name of the file that it would stand on, with the contents of ${JSON.stringify(earlier.origin.name)}; give the new file another name`,
    );
  }
  return { file: recordedName(target, `${stem}.qcow2`), format: 'qcow2', exists: false };
}

function backingOfOverlay(overlay: string): string {
  using file = HostFile.open(overlay, { readOnly: true });
  const name = readHeader(file).backingFile;
  if (name === undefined) throw new FsError('EIO', `${overlay}: it has no backing file any more`);
  return locateBacking(overlay, name);
}

/** Both paths absolute. */
function recorded(target: string, path: string): { readonly file: string; readonly format: 'qcow2' | 'raw' } {
  using file = HostFile.open(path, { readOnly: true });
  return { file: recordedName(target, path), format: looksLikeQcow2(file) ? 'qcow2' : 'raw' };
}

async function verified(
  target: string,
  path: string,
  { origin, contents }: EarlierCheckpoint,
  work: Work,
): Promise<ExportBacking> {
  const backing = recorded(target, path);
  if (!(await holds(path, origin, contents, work))) {
    throw new FsError(
      'EINVAL',
      `${path}: does not hold the checkpoint ${JSON.stringify(origin.name)}, so that nothing can stand on it; export that checkpoint to a file, and give it as --backing`,
    );
  }
  return { ...backing, exists: true };
}

async function holds(path: string, origin: ExportOrigin, contents: Source, work: Work): Promise<boolean> {
  const top = await openBacking(path, CACHE_BYTES);
  try {
    if (top.qcow2 !== undefined && isFrom(top.qcow2.header, origin)) return true;
    return await haveSameContents(contents, new LayerContents(top.backing), work);
  } finally {
    for (const layer of top.chain) layer[Symbol.dispose]();
  }
}

/** The bytes of a plain file. */
export function fileSource(file: HostFile): Source {
  return {
    size: () => file.size(),
    read: (target, at, length, offset) => {
      const got = file.read(target, at, length, offset);
      if (got < length) throw new FsError('EIO', `${file.path}: ends at byte ${offset + got}; it has become shorter`);
    },
    nextData: (offset) => file.nextData(offset),
    nextHole: (offset) => file.nextHole(offset),
  };
}
