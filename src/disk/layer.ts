/** One image file of a disk, open and locked, with what is known of it. */
import { basename } from 'node:path';
import type { Header } from '../qcow2/header.ts';
import type { Backing, Image, SharedImage } from '../qcow2/image.ts';
import { imageBacking, rawBacking } from '../qcow2/layer.ts';
import { openImage } from '../qcow2/open-image.ts';
import type { SnapshotList } from '../qcow2/snapshots.ts';
import type { HostFile } from '../storage/host-file.ts';
import type { SharedChain, SharedLayer } from './chain.ts';
import { markOf, type OverlayMark } from './overlay-mark.ts';

let lastId = 0;

export interface LayerFile {
  /** As it was found: absolute. */
  readonly path: string;
  readonly file: HostFile;
  /** The external data file, if the image has one. */
  readonly data?: HostFile | undefined;
}

/** What a qcow2 image has; a raw file has nothing of it. */
export interface LayerImage {
  readonly header: Header;
  readonly snapshots: SnapshotList;
  readonly image: Image;
  readonly shared: SharedImage;
}

export class Layer implements Disposable {
  path: string;
  readonly file: HostFile;
  readonly data: HostFile | undefined;
  /** The next layer of its chain; undefined at the bottom. */
  #below: Layer | undefined;
  /** What makes it an overlay of this program. */
  mark: OverlayMark | undefined;
  #opened: LayerImage | undefined;
  #backing!: Backing;
  #shared!: SharedLayer;

  constructor({ path, file, data }: LayerFile, opened: LayerImage | undefined, below: Layer | undefined) {
    this.path = path;
    this.file = file;
    this.data = data;
    this.#below = below;
    this.mark = opened === undefined ? undefined : markOf(opened.header);
    this.reopen(opened);
  }

  get format(): 'qcow2' | 'raw' {
    return this.#opened === undefined ? 'raw' : 'qcow2';
  }

  /** File name of the image. */
  get name(): string {
    return basename(this.path);
  }

  get below(): Layer | undefined {
    return this.#below;
  }

  /** Undefined for a raw file. */
  get qcow2(): LayerImage | undefined {
    return this.#opened;
  }

  /** This thread's object. @throws Error for a raw file */
  get image(): Image {
    if (this.#opened === undefined) throw new Error(`${this.path} is raw`);
    return this.#opened.image;
  }

  /** The layer and all below it, as what one above reads. */
  get backing(): Backing {
    return this.#backing;
  }

  /** Bytes of its disk. */
  get virtualSize(): number {
    return this.#backing.size();
  }

  /** The layer and all below it, top first. */
  get chain(): readonly Layer[] {
    const layers: Layer[] = [];
    for (let layer: Layer | undefined = this; layer !== undefined; layer = layer.#below) layers.push(layer);
    return layers;
  }

  /** For other threads. */
  get shared(): SharedChain {
    return this.chain.map((layer) => layer.#shared);
  }

  /** The file has another name now. */
  moveTo(path: string): void {
    this.path = path;
    this.file.moveTo(path);
  }

  /** Another layer is below it from now on, with the same contents. Other threads attach their views anew. */
  follow(below: Layer | undefined): void {
    this.#below = below;
    if (this.#opened !== undefined) this.#opened.image.backing = below?.backing;
  }

  /** The same file with memory of its own, after it was changed or is about to be. Those above must `follow` it. */
  reopen(opened: LayerImage | undefined): void {
    const id = ++lastId;
    this.#opened = opened;
    if (opened === undefined) {
      this.#backing = rawBacking(this.file);
      this.#shared = { id, file: this.file.share(), format: 'raw' };
    } else {
      opened.image.backing = this.#below?.backing;
      this.#backing = imageBacking(opened.image);
      this.#shared = { id, file: this.file.share(), format: 'qcow2', data: this.data?.share(), image: opened.shared };
    }
  }

  [Symbol.dispose](): void {
    this.file[Symbol.dispose]();
    this.data?.[Symbol.dispose]();
  }
}

export interface LoadOptions {
  readonly writable: boolean;
  /** Memory for the caches, in bytes. */
  readonly cacheBytes: number;
}

/** The tables of an image into memory. @throws CorruptImage, FsError EIO */
export function loadImage(
  { file, data }: LayerFile,
  header: Header,
  snapshots: SnapshotList,
  { writable, cacheBytes }: LoadOptions,
): LayerImage {
  const table = { entries: snapshots.entries, bytes: snapshots.tableBytes };
  const opened = openImage({
    file,
    data: data ?? file,
    backing: undefined,
    header,
    snapshots: table,
    writable,
    cacheBytes,
  });
  return { header, snapshots, ...opened };
}
