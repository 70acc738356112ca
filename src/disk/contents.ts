/** The views of a disk's bytes, over one thread's image object. */
import { FsError } from '../errors.ts';
import { zeroRange } from '../qcow2/discard.ts';
import { flushIfRoom, tidy } from '../qcow2/flush.ts';
import type { Backing, Image } from '../qcow2/image.ts';
import { extentAt } from '../qcow2/layer.ts';
import type { L1Table } from '../qcow2/lookup.ts';
import { readRange } from '../qcow2/read.ts';
import { writeRange } from '../qcow2/write.ts';
import type { HostFile } from '../storage/host-file.ts';
import type { Contents } from './disk.ts';

/** Searches for data and holes look at this much of the disk at a time. */
const SEARCH_BYTES = 2 ** 40;

/** The live contents. */
export class LiveContents implements Contents {
  #image: Image;

  constructor(image: Image) {
    this.#image = image;
  }

  /** Show another image from now on: the disk goes on in an overlay, or in what one was merged into. */
  follow(image: Image): void {
    this.#image = image;
  }

  size(): number {
    return this.#image.virtualSize();
  }

  read(target: Uint8Array, at: number, length: number, offset: number): void {
    readRange(this.#image, undefined, target, at, length, offset);
  }

  write(source: Uint8Array, at: number, length: number, offset: number): boolean {
    this.#checkWritable();
    return writeRange(this.#image, source, at, length, offset);
  }

  discard(offset: number, length: number): boolean {
    this.#checkWritable();
    return zeroRange(this.#image, offset, length, 'free');
  }

  writeZeroes(offset: number, length: number): boolean {
    this.#checkWritable();
    return zeroRange(this.#image, offset, length, 'keep');
  }

  flush(): void {
    if (this.#image.geometry.writable) flushIfRoom(this.#image);
  }

  tidy(): void {
    if (this.#image.geometry.writable) tidy(this.#image);
  }

  nextData(offset: number): number {
    return search(this.#image, undefined, 0, this.size(), offset, true);
  }

  nextHole(offset: number): number {
    return search(this.#image, undefined, 0, this.size(), offset, false);
  }

  #checkWritable(): void {
    if (!this.#image.geometry.writable) throw new FsError('EROFS', `${this.#image.file.path} is open for reading only`);
  }
}

const neverChanges = (): FsError =>
  new FsError('EROFS', 'a checkpoint never changes; write to disk.raw, or roll back to the checkpoint first');

/** Bytes of a checkpoint. */
abstract class FrozenContents implements Contents {
  abstract size(): number;
  abstract read(target: Uint8Array, at: number, length: number, offset: number): void;
  abstract nextData(offset: number): number;
  abstract nextHole(offset: number): number;

  write(): boolean {
    throw neverChanges();
  }

  discard(): boolean {
    throw neverChanges();
  }

  writeZeroes(): boolean {
    throw neverChanges();
  }

  flush(): void {}
}

/** What a snapshot shows: its disk, or its VM state, which lies behind the disk in the same mapping. */
export class SnapshotContents extends FrozenContents {
  #image: Image;
  readonly #table: L1Table;
  /** Guest offset of the first byte. */
  readonly #base: number;
  readonly #size: number;

  constructor(image: Image, table: L1Table, base: number, size: number) {
    super();
    this.#image = image;
    this.#table = table;
    this.#base = base;
    this.#size = size;
  }

  /** The same image file, opened anew. */
  follow(image: Image): void {
    this.#image = image;
  }

  override size(): number {
    return this.#size;
  }

  override read(target: Uint8Array, at: number, length: number, offset: number): void {
    readRange(this.#image, this.#table, target, at, length, this.#base + offset);
  }

  override nextData(offset: number): number {
    return search(this.#image, this.#table, this.#base, this.#size, offset, true);
  }

  override nextHole(offset: number): number {
    return search(this.#image, this.#table, this.#base, this.#size, offset, false);
  }
}

/** What an external checkpoint shows: a layer that is frozen, with all below it. */
export class LayerContents extends FrozenContents {
  #layer: Backing;

  constructor(layer: Backing) {
    super();
    this.#layer = layer;
  }

  /** The same bytes in another file: a merge has moved them. */
  follow(layer: Backing): void {
    this.#layer = layer;
  }

  override size(): number {
    return this.#layer.size();
  }

  override read(target: Uint8Array, at: number, length: number, offset: number): void {
    this.#layer.read(target, at, length, offset);
  }

  override nextData(offset: number): number {
    return searchLayer(this.#layer, offset, true);
  }

  override nextHole(offset: number): number {
    return searchLayer(this.#layer, offset, false);
  }
}

/** The bytes of a host file as they are: of an overlay, or of a guest's state. */
export class FileContents extends FrozenContents {
  readonly #file: HostFile;

  constructor(file: HostFile) {
    super();
    this.#file = file;
  }

  override size(): number {
    return this.#file.size();
  }

  override read(target: Uint8Array, at: number, length: number, offset: number): void {
    const got = this.#file.read(target, at, length, offset);
    if (got < length) target.fill(0, at + got, at + length);
  }

  override nextData(offset: number): number {
    return this.#file.nextData(offset);
  }

  override nextHole(offset: number): number {
    return this.#file.nextHole(offset);
  }
}

/** First offset ≥ `offset` with data, or without; -1 (data) or the size (hole) if there is none. */
export function search(
  image: Image,
  table: L1Table | undefined,
  base: number,
  size: number,
  offset: number,
  data: boolean,
): number {
  let position = offset;
  while (position < size) {
    const found = extentAt(image, table, base + position, Math.min(size - position, SEARCH_BYTES));
    if (found.data === data) return position;
    position += found.length;
  }
  return data ? -1 : size;
}

/** As `search`, in a whole layer. */
function searchLayer(layer: Backing, offset: number, data: boolean): number {
  const size = layer.size();
  let position = offset;
  while (position < size) {
    const found = layer.extentAt(position, Math.min(size - position, SEARCH_BYTES));
    if (found.data === data) return position;
    position += found.length;
  }
  return data ? -1 : size;
}
