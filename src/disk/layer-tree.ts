/**
 * All images of a disk: its own, the overlays of this program over it, and what lies below. The live disk is one end of
 * the tree; the others are branches that a roll back has left.
 */
import { realpathSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { FsError } from '../errors.ts';
import { type DiscoveredDisk, discoverDisk, FolderScan, type FoundImage } from './folder-scan.ts';
import type { Layer } from './layer.ts';
import { mendOverlays } from './mend-overlays.ts';
import { openChain } from './open-chain.ts';
import { forgetElsewhere, rememberElsewhere } from './overlay.ts';

export interface TreeOptions {
  readonly readOnly: boolean;
  /** Memory for the caches of each image, in bytes. */
  readonly cacheBytes: number;
  /** Where new overlays go; undefined: beside the live image. */
  readonly overlayFolder?: string | undefined;
  /** More folders with images that may depend on those of the disk. */
  readonly backingRoots?: readonly string[];
  /** Mountpoints of this process: never looked into. */
  readonly avoid?: readonly string[];
  /**
   * The guest's own process has the image open: only this image and what is below it, for reading, without locks.
   */
  readonly unlocked?: boolean;
}

/** A folder of images that all need it is mended in one go. */
const MOST_MENDINGS = 1000;

export class LayerTree implements Disposable {
  /** The image that the disk is named after. */
  #bottom: Layer;
  readonly options: TreeOptions;
  /** Why nothing can be written, although that was asked for. */
  readonly unwritable: string | undefined;
  /** Images of others are why. */
  readonly builtOn: boolean;
  #active: Layer;
  /** Every open layer. */
  readonly #layers: Set<Layer>;

  private constructor(
    bottom: Layer,
    active: Layer,
    layers: Iterable<Layer>,
    options: TreeOptions,
    unwritable: string | undefined,
    builtOn: boolean,
  ) {
    this.#bottom = bottom;
    this.#active = active;
    this.#layers = new Set(layers);
    this.options = options;
    this.unwritable = unwritable;
    this.builtOn = builtOn;
  }

  /** Open everything that belongs to the disk of an image, and lock it. @throws FsError with nothing left open */
  static async open(path: string, options: TreeOptions): Promise<LayerTree> {
    const { unlocked = false } = options;
    const found = unlocked ? alone(path) : await findDisk(path, options);
    // A disk of one image keeps the path that it was given by.
    const single = found.overlays.length === 0;
    const hindrance = options.readOnly ? undefined : hindranceOf(found);
    const layers = new Map<string, Layer>();
    const keep = (top: Layer): void => {
      for (const layer of top.chain) layers.set(layer.path, layer);
    };
    const ours = new Set([found.bottom, ...found.overlays.map((overlay) => overlay.path)]);
    try {
      const chain = await openChain(single ? path : found.active, {
        readOnly: options.readOnly || hindrance !== undefined,
        cacheBytes: options.cacheBytes,
        mayWrite: options.readOnly ? new Set() : ours,
        unlocked,
      });
      keep(chain.top);
      let { unwritable = hindrance?.why } = chain;
      for (const { path: branch } of found.overlays) {
        if (layers.has(branch)) continue;
        try {
          keep((await openChain(branch, { ...options, readOnly: true, known: layers, mayWrite: ours })).top);
        } catch (error) {
          if (!(error instanceof FsError)) throw error;
          unwritable ??= `the branch ${basename(branch)} cannot be opened: ${error.message}`;
        }
      }
      if (!options.readOnly && unwritable === undefined) rememberMoved(found.moved, layers);
      const bottom = single ? chain.top : layers.get(found.bottom);
      if (bottom === undefined) throw new FsError('EIO', `${path}: the chain changed while it was being opened`);
      return new LayerTree(bottom, chain.top, layers.values(), options, unwritable, hindrance?.builtOn ?? false);
    } catch (error) {
      for (const layer of layers.values()) layer[Symbol.dispose]();
      throw error;
    }
  }

  get bottom(): Layer {
    return this.#bottom;
  }

  /** An overlay has taken over the name of the image, with all that is in it. */
  replaceBottom(layer: Layer): void {
    this.#bottom = layer;
  }

  /** The layer that is written. */
  get active(): Layer {
    return this.#active;
  }

  get layers(): ReadonlySet<Layer> {
    return this.#layers;
  }

  /** In the order in which they were made. */
  get overlays(): readonly Layer[] {
    return [...this.#layers]
      .filter(({ mark }) => mark !== undefined)
      .sort((a, b) => (a.mark?.sequence ?? 0) - (b.mark?.sequence ?? 0));
  }

  /** The folder of the next overlay, without links. */
  get overlayFolder(): string {
    return realpathSync(this.options.overlayFolder ?? dirname(this.#active.path));
  }

  get nextSequence(): number {
    return 1 + Math.max(0, ...[...this.#layers].map(({ mark }) => mark?.sequence ?? 0));
  }

  /** Overlays of the disk that stand on this layer. */
  above(layer: Layer): readonly Layer[] {
    return [...this.#layers].filter(({ below }) => below === layer);
  }

  add(layer: Layer): void {
    this.#layers.add(layer);
  }

  activate(layer: Layer): void {
    this.#active = layer;
  }

  /** The layer is part of the disk no more. */
  forget(layer: Layer): void {
    this.#layers.delete(layer);
  }

  /** As `forget`, and closes it: views of other threads must have let go of it. */
  remove(layer: Layer): void {
    this.forget(layer);
    layer[Symbol.dispose]();
  }

  /** Images of others that have one of these layers as their backing file, by the files as they are now. */
  async dependents(layers: readonly Layer[]): Promise<readonly FoundImage[]> {
    const scan = new FolderScan(this.options.avoid);
    const paths = new Set(layers.map(({ path }) => real(path)));
    const own = new Set([...this.#layers].map(({ path }) => real(path)));
    const folders = new Set([...foldersOf(this.options), ...[...paths].map((path) => dirname(path))]);
    const found: FoundImage[] = [];
    for (const folder of folders) {
      for (const image of await scan.folder(folder)) {
        if (image.backing !== undefined && paths.has(image.backing) && !own.has(image.path)) found.push(image);
      }
    }
    return found;
  }

  [Symbol.dispose](): void {
    for (const layer of this.#layers) layer[Symbol.dispose]();
  }
}

/** Overlays that came to lie in another folder are found there from now on, given or not. */
function rememberMoved(moved: DiscoveredDisk['moved'], layers: ReadonlyMap<string, Layer>): void {
  for (const { below, from, to } of moved) {
    const layer = layers.get(below);
    if (layer === undefined) continue;
    try {
      // In this order: at no moment is nothing known of it.
      rememberElsewhere(layer, to);
      forgetElsewhere(layer, from);
    } catch (error) {
      // No room for both in the header, or a full disk: the folder has to be given again.
      if (!(error instanceof FsError)) throw error;
    }
  }
}

const alone = (path: string): DiscoveredDisk => ({
  bottom: path,
  overlays: [],
  active: path,
  foreign: [],
  missing: [],
  ambiguous: [],
  moved: [],
});

/** The disk as the files tell of it, after what a process that died has left was mended. */
async function findDisk(path: string, options: TreeOptions): Promise<DiscoveredDisk> {
  const folders = foldersOf(options);
  let scan = new FolderScan(options.avoid);
  for (let left = MOST_MENDINGS; left > 0 && (await mendOverlays(scan, path, folders, options)); left--) {
    scan = new FolderScan(options.avoid);
  }
  return discoverDisk(scan, path, folders);
}

const foldersOf = ({ overlayFolder, backingRoots = [] }: TreeOptions): readonly string[] =>
  overlayFolder === undefined ? backingRoots : [overlayFolder, ...backingRoots];

/** The path without links: of files that are open, so that looking at it goes nowhere else. */
function real(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return path;
  }
}

/** Why the live image must not be written. */
function hindranceOf({
  active,
  foreign,
  missing,
  ambiguous,
}: Awaited<ReturnType<typeof discoverDisk>>): { readonly why: string; readonly builtOn: boolean } | undefined {
  if (ambiguous.length > 0) {
    const why = `${ambiguous.join(' and ')} both claim to be the end of its chain, as a copy does; move all but one of them elsewhere`;
    return { why, builtOn: false };
  }
  if (missing.length > 0) {
    const why = `it goes on in ${missing.join(', ')}, which ${missing.length === 1 ? 'is' : 'are'} not there; bring it back, or give its folder by --overlay-dir`;
    return { why, builtOn: false };
  }
  const on = foreign.filter(({ backing }) => backing === active).map(({ path }) => path);
  if (on.length === 0) return undefined;
  const why = `${on.join(', ')} ${on.length === 1 ? 'has' : 'have'} it as backing file, and would break if it changed; mount that instead, or move it out of the folder if it is not needed`;
  return { why, builtOn: true };
}
