import { readFileSync } from 'node:fs';
import type { Storage } from '../../src/storage/storage.ts';

const PAGE_BYTES = 4096;

/** A sparse file in memory: pages never written read as zeros and take no room. */
export class MemoryStorage implements Storage {
  readonly path: string;
  readonly readOnly = false;
  readonly #pages = new Map<number, Uint8Array>();
  #size = 0;
  /** Every write, flush and truncate in order; for tests that cut the power. */
  readonly log: StorageEvent[] = [];

  constructor(path = 'memory.qcow2', bytes?: Uint8Array) {
    this.path = path;
    if (bytes !== undefined) this.#put(bytes, 0, bytes.length, 0);
  }

  static load(path: string): MemoryStorage {
    return new MemoryStorage(path, readFileSync(path));
  }

  size(): number {
    return this.#size;
  }

  read(target: Uint8Array, at: number, length: number, position: number): number {
    const end = Math.min(position + length, this.#size);
    let done = 0;
    while (position + done < end) {
      const page = this.#pages.get(Math.floor((position + done) / PAGE_BYTES));
      const within = (position + done) % PAGE_BYTES;
      const count = Math.min(PAGE_BYTES - within, end - position - done);
      if (page === undefined) target.fill(0, at + done, at + done + count);
      else target.set(page.subarray(within, within + count), at + done);
      done += count;
    }
    return done;
  }

  write(source: Uint8Array, at: number, length: number, position: number): void {
    this.log.push({ kind: 'write', position, bytes: source.slice(at, at + length) });
    this.#put(source, at, length, position);
  }

  #put(source: Uint8Array, at: number, length: number, position: number): void {
    for (let done = 0; done < length; ) {
      const index = Math.floor((position + done) / PAGE_BYTES);
      const within = (position + done) % PAGE_BYTES;
      const count = Math.min(PAGE_BYTES - within, length - done);
      let page = this.#pages.get(index);
      if (page === undefined) this.#pages.set(index, (page = new Uint8Array(PAGE_BYTES)));
      page.set(source.subarray(at + done, at + done + count), within);
      done += count;
    }
    this.#size = Math.max(this.#size, position + length);
  }

  flush(): void {
    this.log.push({ kind: 'flush' });
  }

  truncate(size: number): void {
    this.log.push({ kind: 'truncate', size });
    if (size < this.#size) {
      for (const index of this.#pages.keys()) if (index * PAGE_BYTES >= size) this.#pages.delete(index);
      this.#pages.get(Math.floor(size / PAGE_BYTES))?.fill(0, size % PAGE_BYTES);
    }
    this.#size = size;
  }

  punch(position: number, length: number): boolean {
    if (position < this.#size) {
      const zeros = new Uint8Array(Math.min(length, this.#size - position));
      this.write(zeros, 0, zeros.length, position);
    }
    return true;
  }

  nextData(position: number): number {
    return position < this.#size ? position : -1;
  }

  nextHole(): number {
    return this.#size;
  }

  allocatedBytes(): number {
    return this.#pages.size * PAGE_BYTES;
  }

  /** The whole contents; for small files. */
  bytes(): Uint8Array {
    const target = new Uint8Array(this.#size);
    this.read(target, 0, target.length, 0);
    return target;
  }
}

export type StorageEvent =
  | { readonly kind: 'write'; readonly position: number; readonly bytes: Uint8Array }
  | { readonly kind: 'flush' }
  | { readonly kind: 'truncate'; readonly size: number };
