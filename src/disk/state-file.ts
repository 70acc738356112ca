/** A file of guest state on the host, beside its overlay, while the guest writes it. */
import { HostFile, type SharedFile } from '../storage/host-file.ts';
import type { StateContents } from './disk.ts';

/** Blocks of zeros of this size, and aligned to it, take no space. */
const BLOCK_BYTES = 4096;

const ZEROS = Buffer.alloc(BLOCK_BYTES);

/** As plain data, for other threads. */
export interface SharedStateFile {
  readonly file: SharedFile;
  /** One 64-bit number: bytes of the file, which may end in zeros that the host's file does not have yet. */
  readonly size: SharedArrayBuffer;
}

export class StateFileContents implements StateContents {
  readonly #file: HostFile;
  readonly #size: BigInt64Array;

  constructor(file: HostFile, size: SharedArrayBuffer) {
    this.#file = file;
    this.#size = new BigInt64Array(size);
  }

  static attach({ file, size }: SharedStateFile): StateFileContents {
    return new StateFileContents(HostFile.adopt(file), size);
  }

  size(): number {
    return Number(Atomics.load(this.#size, 0));
  }

  setSize(bytes: number): void {
    Atomics.store(this.#size, 0, BigInt(bytes));
    this.#file.truncate(bytes);
  }

  read(target: Uint8Array, at: number, length: number, offset: number): void {
    const got = this.#file.read(target, at, length, offset);
    if (got < length) target.fill(0, at + got, at + length);
  }

  write(source: Uint8Array, at: number, length: number, offset: number): boolean {
    const end = offset + length;
    // Runs of blocks that hold something go out by one call each.
    let from = offset;
    for (let position = offset; position < end; ) {
      const next = Math.min(end, (Math.floor(position / BLOCK_BYTES) + 1) * BLOCK_BYTES);
      if (isZero(source, at + (position - offset), next - position)) {
        this.#put(source, at + (from - offset), position - from, from);
        this.#clear(position, next - position);
        from = next;
      }
      position = next;
    }
    this.#put(source, at + (from - offset), end - from, from);
    this.#growTo(end);
    return true;
  }

  discard(offset: number, length: number): boolean {
    return this.writeZeroes(offset, length);
  }

  writeZeroes(offset: number, length: number): boolean {
    this.#clear(offset, length);
    this.#growTo(offset + length);
    return true;
  }

  flush(): void {
    this.#file.flush();
  }

  nextData(offset: number): number {
    return this.#file.nextData(offset);
  }

  nextHole(offset: number): number {
    return Math.min(this.#file.nextHole(offset), this.size());
  }

  /** The host's file gets its whole length; durable. */
  finish(): void {
    this.#file.truncate(this.size());
    this.#file.flush();
  }

  #put(source: Uint8Array, at: number, length: number, offset: number): void {
    if (length > 0) this.#file.write(source, at, length, offset);
  }

  /** Zeros where something may have been written before; behind the end of the host's file there are some already. */
  #clear(offset: number, length: number): void {
    const there = Math.min(length, this.#file.size() - offset);
    if (there <= 0 || this.#file.punch(offset, there)) return;
    for (let done = 0; done < there; done += BLOCK_BYTES) {
      this.#file.write(ZEROS, 0, Math.min(BLOCK_BYTES, there - done), offset + done);
    }
  }

  #growTo(end: number): void {
    const wanted = BigInt(end);
    for (let now = Atomics.load(this.#size, 0); now < wanted; ) {
      const before = Atomics.compareExchange(this.#size, 0, now, wanted);
      if (before === now) return;
      now = before;
    }
  }
}

const isZero = (bytes: Uint8Array, at: number, length: number): boolean =>
  ZEROS.compare(bytes, at, at + length, 0, length) === 0;
