/** One image file of a disk, open and locked, with what is known of it. */
import { basename } from 'node:path';
import { type Header, readHeader } from '../qcow2/header.ts';
import type { Backing, Image, SharedImage } from '../qcow2/image.ts';
import { imageBacking, rawBacking } from '../qcow2/layer.ts';
import { openImage } from '../qcow2/open-image.ts';
import type { SnapshotList } from '../qcow2/snapshots.ts';
import type { HostFile } from '../storage/host-file.ts';
import type { SharedChain, SharedLayer } from './chain.ts';
import { attachRun, type SharedRun, shareRun } from './frozen-run.ts';
import { markOf, type OverlayMark } from './overlay-mark.ts';

let lastId = 0;
/** Counts up whenever a layer comes to be another, or to stand on another. */
let changes = 0;

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
  /** Memory for its caches, in bytes. */
  readonly cacheBytes: number;
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
  /** By itself, through its own caches. */
  #own!: Backing;
  #shared!: SharedLayer;
  /** Of a file that does not change. */
  #hostBytes: number | undefined;
  /** What `backing` goes to, as of `changes`. */
  #reader: WeakRef<Backing> | undefined;
  #readerOf = -1;
  /** The mapping that begins here, and the layers that it is of. */
  #run: WeakRef<SharedRun> | undefined;
  #runOf = '';
  /** The layer and all below it, as what one above reads. It stays right whatever changes below. */
  readonly backing: Backing = {
    size: () => this.virtualSize,
    read: (target, at, length, offset) => this.#read().read(target, at, length, offset),
    extentAt: (offset, length) => this.#read().extentAt(offset, length),
  };

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

  /** Bytes of its disk. */
  get virtualSize(): number {
    return this.#own.size();
  }

  /** Bytes that the host has allocated to the file. Those of a long chain are summed up whenever someone asks for a disk's. */
  get hostBytes(): number {
    if (this.#opened === undefined || !this.isFrozen) return this.file.allocatedBytes();
    this.#hostBytes ??= this.file.allocatedBytes();
    return this.#hostBytes;
  }

  /** The layer and all below it, top first. */
  get chain(): readonly Layer[] {
    const layers: Layer[] = [];
    for (let layer: Layer | undefined = this; layer !== undefined; layer = layer.#below) layers.push(layer);
    return layers;
  }

  /** For other threads. */
  get shared(): SharedChain {
    const shared: SharedLayer[] = [this.#shared];
    for (let layer = this.#below; layer !== undefined; ) {
      const run = layer.#frozen();
      shared.push({ ...layer.#shared, ...(run.length > 1 && { run: layer.#sharedRun(run) }) });
      for (const other of run.slice(1)) shared.push(other.#shared);
      layer = (run.at(-1) ?? layer).below;
    }
    return shared;
  }

  /** The file has another name now. */
  moveTo(path: string): void {
    this.path = path;
    this.file.moveTo(path);
  }

  /** Another layer is below it from now on, with the same contents. Other threads attach their views anew. */
  follow(below: Layer | undefined): void {
    changes++;
    this.#below = below;
    if (this.#opened !== undefined) this.#opened.image.backing = below?.backing;
  }

  /** The same file with memory of its own, after it was changed or is about to be. Those above must `follow` it. */
  reopen(opened: LayerImage | undefined): void {
    const id = ++lastId;
    changes++;
    this.#opened = opened;
    this.#hostBytes = undefined;
    if (opened === undefined) {
      this.#own = rawBacking(this.file);
      this.#shared = { id, file: this.file.share(), format: 'raw' };
    } else {
      opened.image.backing = this.#below?.backing;
      this.#own = imageBacking(opened.image);
      this.#shared = { id, file: this.file.share(), format: 'qcow2', data: this.data?.share(), image: opened.shared };
    }
  }

  /** Nobody writes it. What a raw file holds may change, but not where. */
  get isFrozen(): boolean {
    return this.#opened === undefined || !this.#opened.image.geometry.writable;
  }

  /** The layers from this one down, as long as they do not change; none if this one does. */
  #frozen(): readonly Layer[] {
    const run: Layer[] = [];
    for (let layer: Layer | undefined = this; layer?.isFrozen; layer = layer.#below) run.push(layer);
    return run;
  }

  #sharedRun(run: readonly Layer[]): SharedRun {
    const { below } = run.at(-1) ?? this;
    const key = [...run, ...(below === undefined ? [] : [below])].map((layer) => layer.#shared.id).join();
    const known = this.#runOf === key ? this.#run?.deref() : undefined;
    if (known !== undefined) return known;
    const made = shareRun(
      run.map((layer) => layer.#shared),
      this.#opened?.cacheBytes ?? 0,
    );
    this.#run = new WeakRef(made);
    this.#runOf = key;
    return made;
  }

  /** Through one mapping if there are several layers that do not change. */
  #read(): Backing {
    const known = this.#readerOf === changes ? this.#reader?.deref() : undefined;
    if (known !== undefined) return known;
    const run = this.#frozen();
    const reader =
      run.length < 2
        ? this.#own
        : attachRun(
            this.#sharedRun(run),
            run.map((layer) => layer.#shared),
            run.at(-1)?.below?.backing,
          );
    this.#reader = new WeakRef(reader);
    this.#readerOf = changes;
    return reader;
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

/** What was written is read only from now on: everything is in the file. @throws CorruptImage, FsError EIO */
export function loadFrozen(layer: Layer): LayerImage {
  if (layer.qcow2 === undefined) throw new Error(`${layer.path} is raw`);
  const { snapshots, cacheBytes } = layer.qcow2;
  return loadImage(layer, readHeader(layer.file), snapshots, { writable: false, cacheBytes });
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
  return { header, snapshots, cacheBytes, ...opened };
}
