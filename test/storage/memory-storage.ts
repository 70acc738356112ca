import { closeSync, ftruncateSync, openSync, readFileSync, writeSync } from 'node:fs';
import { FsError } from '../../src/errors.ts';
import type { Storage } from '../../src/storage/storage.ts';

/** What is allocated, punched and found by nextData and nextHole at once. */
export const PAGE_BYTES = 65_536;

export interface MemoryStorageOptions {
  readonly path?: string;
  readonly readOnly?: boolean;
  /** `false`: a host file system that cannot punch. */
  readonly punches?: boolean;
}

/** A sparse file in memory, for tests that need many of them. Copies share pages until one of them writes. */
export class MemoryStorage implements Storage {
  readonly path: string;
  readonly readOnly: boolean;
  readonly #punches: boolean;
  #size = 0;
  /** Pages that the host has left: none is as a disk that is full, which takes writes only where the file has pages. */
  freePages = Number.POSITIVE_INFINITY;
  /** A host that copies on write, as ZFS and btrfs do: each write takes a page, and what it replaces stays taken. */
  copiesOnWrite = false;
  readonly #pages = new Map<number, Uint8Array>();
  /** Pages that no copy shares: only these are written in place. */
  readonly #own = new Set<number>();

  constructor({ path = 'memory', readOnly = false, punches = true }: MemoryStorageOptions = {}) {
    this.path = path;
    this.readOnly = readOnly;
    this.#punches = punches;
  }

  static from(bytes: Uint8Array, options: MemoryStorageOptions = {}): MemoryStorage {
    const storage = new MemoryStorage(options);
    storage.#put(bytes, 0, bytes.length, 0);
    return storage;
  }

  /** The contents of a host file; pages of nothing but zeros become holes. */
  static load(path: string, options: MemoryStorageOptions = {}): MemoryStorage {
    const bytes = readFileSync(path);
    const storage = new MemoryStorage({ path, ...options });
    for (let at = 0; at < bytes.length; at += PAGE_BYTES) {
      const page = bytes.subarray(at, at + PAGE_BYTES);
      if (page.some((byte) => byte !== 0)) storage.#put(page, 0, page.length, at);
    }
    storage.#size = bytes.length;
    return storage;
  }

  /** As a host file that other programs can look at. */
  save(path: string): void {
    const fd = openSync(path, 'w');
    try {
      ftruncateSync(fd, this.#size);
      for (const [index, page] of this.#pages) {
        writeSync(fd, page, 0, Math.min(PAGE_BYTES, this.#size - index * PAGE_BYTES), index * PAGE_BYTES);
      }
    } finally {
      closeSync(fd);
    }
  }

  /** An independent copy, writable unless said otherwise; costs nothing until one of the two is written. */
  copy(options: MemoryStorageOptions = {}): MemoryStorage {
    const copy = new MemoryStorage({ path: this.path, punches: this.#punches, ...options });
    copy.#size = this.#size;
    for (const [index, page] of this.#pages) copy.#pages.set(index, page);
    this.#own.clear();
    return copy;
  }

  /** All of it, for comparing small files. */
  bytes(): Uint8Array {
    const all = new Uint8Array(this.#size);
    this.read(all, 0, all.length, 0);
    return all;
  }

  size(): number {
    return this.#size;
  }

  read(target: Uint8Array, at: number, length: number, position: number): number {
    const available = Math.max(0, Math.min(length, this.#size - position));
    for (let done = 0; done < available; ) {
      const { index, within, count } = this.#piece(position + done, available - done);
      const page = this.#pages.get(index);
      if (page === undefined) target.fill(0, at + done, at + done + count);
      else target.set(page.subarray(within, within + count), at + done);
      done += count;
    }
    return available;
  }

  write(source: Uint8Array, at: number, length: number, position: number): void {
    this.#mustBeWritable();
    this.#put(source, at, length, position);
  }

  flush(): void {}

  truncate(size: number): void {
    this.#mustBeWritable();
    if (size < this.#size) this.#clear(size, this.#size);
    this.#size = size;
  }

  punch(position: number, length: number): boolean {
    this.#mustBeWritable();
    if (!this.#punches) return false;
    this.#clear(position, Math.min(position + length, this.#size));
    return true;
  }

  nextData(position: number): number {
    for (let at = position; at < this.#size; at = (Math.floor(at / PAGE_BYTES) + 1) * PAGE_BYTES) {
      if (this.#pages.has(Math.floor(at / PAGE_BYTES))) return at;
    }
    return -1;
  }

  nextHole(position: number): number {
    for (let at = position; at < this.#size; at = (Math.floor(at / PAGE_BYTES) + 1) * PAGE_BYTES) {
      if (!this.#pages.has(Math.floor(at / PAGE_BYTES))) return at;
    }
    return this.#size;
  }

  allocatedBytes(): number {
    return this.#pages.size * PAGE_BYTES;
  }

  #mustBeWritable(): void {
    if (this.readOnly) throw new FsError('EBADF', `'${this.path}' is open read-only`);
  }

  /** The part of a range that lies in the page where it begins. */
  #piece(position: number, length: number): { index: number; within: number; count: number } {
    const index = Math.floor(position / PAGE_BYTES);
    const within = position % PAGE_BYTES;
    return { index, within, count: Math.min(length, PAGE_BYTES - within) };
  }

  #put(source: Uint8Array, at: number, length: number, position: number): void {
    for (let done = 0; done < length; ) {
      const { index, within, count } = this.#piece(position + done, length - done);
      this.#writable(index).set(source.subarray(at + done, at + done + count), within);
      done += count;
      this.#size = Math.max(this.#size, position + done);
    }
  }

  #clear(from: number, to: number): void {
    for (let position = from; position < to; ) {
      const { index, within, count } = this.#piece(position, to - position);
      const wholeRest = position + count >= this.#size;
      if (this.#pages.has(index)) {
        if (within === 0 && (count === PAGE_BYTES || wholeRest)) this.#drop(index);
        else this.#writable(index).fill(0, within, within + count);
      }
      position += count;
    }
  }

  #drop(index: number): void {
    if (this.#pages.delete(index)) this.freePages++;
    this.#own.delete(index);
  }

  #writable(index: number): Uint8Array {
    const found = this.#pages.get(index);
    const mustHaveRoom = found === undefined || this.copiesOnWrite;
    if (mustHaveRoom && this.freePages <= 0) throw new FsError('ENOSPC', `'${this.path}': the host disk is full`);
    if (mustHaveRoom) this.freePages--;
    if (found !== undefined && this.#own.has(index)) return found;
    const page = found?.slice() ?? new Uint8Array(PAGE_BYTES);
    this.#pages.set(index, page);
    this.#own.add(index);
    return page;
  }
}
