/**
 * Which image files lie in a folder, and what their headers say of backing files: the only catalogue of overlays there is.
 *
 * While a mount is served, its folder must not be looked into: whoever waits for an answer of the tree cannot give it.
 * Only regular files are opened, links are not followed, and names inside of a mount are left alone.
 */
import type { Dirent } from 'node:fs';
import { lstat, readdir, realpath } from 'node:fs/promises';
import { basename, dirname, join, resolve, sep } from 'node:path';
import { FsError } from '../errors.ts';
import { type Header, readHeader } from '../qcow2/header.ts';
import { HostFile } from '../storage/host-file.ts';
import { markOf, type OverlayMark, overlaysElsewhere } from './overlay-mark.ts';

/** A qcow2 file. Paths are absolute, without links. */
export interface FoundImage {
  readonly path: string;
  /** The same for two names of one file. */
  readonly inode: string;
  readonly header: Header;
  /** Of an overlay that this program made. */
  readonly mark: OverlayMark | undefined;
  /** Undefined without one, and where it cannot be told. */
  readonly backing: string | undefined;
}

/** Looks into each folder and file once: what it found stays as it was. */
export class FolderScan {
  readonly #avoid: readonly string[];
  readonly #folders = new Map<string, Promise<readonly FoundImage[]>>();
  readonly #images = new Map<string, Promise<FoundImage | undefined>>();

  /** @param avoid folders that must not be looked into, with all below them: mountpoints of this process */
  constructor(avoid: readonly string[] = []) {
    this.#avoid = avoid;
  }

  /** The image at `path`, whatever it is named; undefined if there is none, or it cannot be read. */
  async image(path: string): Promise<FoundImage | undefined> {
    const real = await this.#real(path);
    if (real === undefined) return undefined;
    return this.#remember(real);
  }

  /** All images in a folder, by name; none where it cannot be read. */
  folder(path: string): Promise<readonly FoundImage[]> {
    const folder = resolve(path);
    let found = this.#folders.get(folder);
    if (found === undefined) this.#folders.set(folder, (found = this.#list(folder)));
    return found;
  }

  async #list(path: string): Promise<readonly FoundImage[]> {
    const folder = await this.#real(path);
    if (folder === undefined) return [];
    let entries: Dirent[];
    try {
      entries = await readdir(folder, { withFileTypes: true });
    } catch {
      return [];
    }
    const found: FoundImage[] = [];
    for (const entry of entries) {
      if (!entry.isFile()) continue;
      const image = await this.#remember(join(folder, entry.name));
      if (image !== undefined) found.push(image);
    }
    return found.sort((a, b) => (a.path < b.path ? -1 : 1));
  }

  #remember(real: string): Promise<FoundImage | undefined> {
    let image = this.#images.get(real);
    if (image === undefined) this.#images.set(real, (image = this.#read(real)));
    return image;
  }

  async #read(path: string): Promise<FoundImage | undefined> {
    try {
      const stat = await lstat(path);
      if (!stat.isFile()) return undefined;
      using file = HostFile.open(path, { readOnly: true });
      const header = readHeader(file);
      const name = header.backingFile?.replace(/^file:/, '');
      const backing = name === undefined ? undefined : await this.#real(resolve(dirname(path), name));
      return { path, inode: `${stat.dev}:${stat.ino}`, header, mark: markOf(header), backing };
    } catch (error) {
      // No image, a damaged one, or one that may not be read: it depends on nothing that could be told.
      if (error instanceof FsError || (error as NodeJS.ErrnoException).code !== undefined) return undefined;
      throw error;
    }
  }

  /** Without links; undefined for what is not there or must not be looked at. */
  async #real(path: string): Promise<string | undefined> {
    if (this.#avoid.some((folder) => path === folder || path.startsWith(folder + sep))) return undefined;
    try {
      return await realpath(path);
    } catch {
      return undefined;
    }
  }
}

/** A disk of overlays as the files tell of it. */
export interface DiscoveredDisk {
  /** The image that the disk is named after: the first from the top down that is no overlay of this program. */
  readonly bottom: string;
  /** Overlays of this program over it, each behind the one below it. */
  readonly overlays: readonly FoundImage[];
  /** The file that is written. */
  readonly active: string;
  /** Images of others that have one of the disk's as their backing file. */
  readonly foreign: readonly FoundImage[];
  /** Overlays that the disk once had in other folders, and that are not there. */
  readonly missing: readonly string[];
  /** Overlays that are in another folder than the image below remembers. */
  readonly moved: readonly { readonly below: string; readonly from: string; readonly to: string }[];
  /** Two ends of the chain that could both be the live disk. */
  readonly ambiguous: readonly string[];
}

/**
 * The disk that an image belongs to.
 * @param folders where to look for overlays, besides those of the images themselves
 */
export async function discoverDisk(
  scan: FolderScan,
  path: string,
  folders: readonly string[],
): Promise<DiscoveredDisk> {
  const given = await scan.image(path);
  const bottom = await bottomOf(scan, given?.path ?? resolve(path));
  const looked = new Set<string>();
  const byBacking = new Map<string, FoundImage[]>();
  const known = new Set<string>();
  const add = (image: FoundImage): void => {
    if (image.backing === undefined || known.has(image.path)) return;
    known.add(image.path);
    byBacking.set(image.backing, [...(byBacking.get(image.backing) ?? []), image]);
  };
  const look = async (folder: string): Promise<void> => {
    if (looked.has(folder)) return;
    looked.add(folder);
    for (const image of await scan.folder(folder)) add(image);
  };
  for (const folder of [dirname(bottom), dirname(given?.path ?? bottom), ...folders]) await look(resolve(folder));

  const overlays: FoundImage[] = [];
  const foreign: FoundImage[] = [];
  const missing: string[] = [];
  const moved: { below: string; from: string; to: string }[] = [];
  const queue = [bottom];
  for (let below = queue.shift(); below !== undefined; below = queue.shift()) {
    const image = await scan.image(below);
    for (const other of image === undefined ? [] : overlaysElsewhere(image.header)) {
      await look(dirname(other));
      if ((await scan.image(other)) !== undefined) continue;
      const candidates = byBacking.get(below) ?? [];
      const now = candidates.find(({ mark, path: at }) => mark !== undefined && basename(at) === basename(other));
      if (now === undefined) missing.push(other);
      else moved.push({ below, from: other, to: now.path });
    }
    for (const above of byBacking.get(below) ?? []) {
      if (above.mark === undefined) foreign.push(above);
      else if (!overlays.includes(above)) {
        overlays.push(above);
        queue.push(above.path);
      }
    }
  }
  const { active, ambiguous } = liveEnd(bottom, overlays);
  return { bottom, overlays, active, foreign, missing, moved, ambiguous };
}

/** Down from an overlay of this program to what it was made over. Of other images, the path without links. */
export async function bottomOf(scan: FolderScan, path: string): Promise<string> {
  const seen = new Set<string>();
  let at = path;
  for (;;) {
    const image = await scan.image(at);
    if (image?.mark === undefined || image.backing === undefined || seen.has(at)) return image?.path ?? at;
    seen.add(at);
    at = image.backing;
  }
}

/** Of the ends of the chain, the one made last; those that the disk has left count only if there is no other. */
function liveEnd(bottom: string, overlays: readonly FoundImage[]): { active: string; ambiguous: string[] } {
  const ends = overlays.filter(({ path }) => !overlays.some(({ backing }) => backing === path));
  const open = ends.filter(({ mark }) => mark?.kept !== true);
  const candidates = open.length > 0 ? open : ends;
  if (candidates.length === 0) return { active: bottom, ambiguous: [] };
  const last = Math.max(...candidates.map(({ mark }) => mark?.sequence ?? 0));
  const paths = candidates.filter(({ mark }) => mark?.sequence === last).map(({ path }) => path);
  return { active: paths[0] as string, ambiguous: paths.length > 1 ? paths : [] };
}
