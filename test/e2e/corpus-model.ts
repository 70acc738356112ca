/** A disk as a plain array in memory: what the tests believe is in it. */

const PAGE = 4096;
const ZEROES = Buffer.alloc(PAGE);

/** Range of bytes, `end` not in it. */
export interface Range {
  readonly start: number;
  readonly end: number;
}

export class SparseModel {
  #size: number;
  /** By page number. A page's bytes never change: a write puts a new page in its place, so clones may share them. */
  readonly #pages: Map<number, Buffer>;

  constructor(size: number, pages = new Map<number, Buffer>()) {
    this.#size = size;
    this.#pages = pages;
  }

  get size(): number {
    return this.#size;
  }

  clone(): SparseModel {
    return new SparseModel(this.#size, new Map(this.#pages));
  }

  write(offset: number, data: Uint8Array): void {
    this.#checkRange(offset, data.length);
    for (let done = 0; done < data.length; ) {
      const at = (offset + done) % PAGE;
      const count = Math.min(PAGE - at, data.length - done);
      const index = (offset + done - at) / PAGE;
      const page = Buffer.from(this.#pages.get(index) ?? ZEROES);
      page.set(data.subarray(done, done + count), at);
      this.#put(index, page);
      done += count;
    }
  }

  zero(offset: number, length: number): void {
    this.#checkRange(offset, length);
    // By the pages that exist: the range may be terabytes long.
    for (const [index, old] of [...this.#pages]) {
      const start = Math.max(offset - index * PAGE, 0);
      const end = Math.min(offset + length - index * PAGE, PAGE);
      if (start < end) this.#put(index, Buffer.from(old).fill(0, start, end));
    }
  }

  /** Bytes past a smaller size are gone; bytes up to a larger one are zeros. */
  resize(size: number): void {
    if (size < this.#size) this.zero(size, this.#size - size);
    this.#size = size;
  }

  read(offset: number, length: number): Buffer {
    const result = Buffer.alloc(length);
    for (let done = 0; done < length; ) {
      const at = (offset + done) % PAGE;
      const count = Math.min(PAGE - at, length - done);
      this.#pages.get((offset + done - at) / PAGE)?.copy(result, done, at, at + count);
      done += count;
    }
    return result;
  }

  /** Where this holds anything but zeros, in order; neighbouring pages in one range, none longer than `maxBytes`. */
  dataRanges(maxBytes = 1 << 20): Range[] {
    const ranges: { start: number; end: number }[] = [];
    for (const page of [...this.#pages.keys()].sort((a, b) => a - b)) {
      const last = ranges.at(-1);
      const end = Math.min((page + 1) * PAGE, this.#size);
      if (last?.end === page * PAGE && end - last.start <= maxBytes) last.end = end;
      else ranges.push({ start: page * PAGE, end });
    }
    return ranges;
  }

  /** The first byte at which the two differ, or where the shorter ends; undefined if they are equal. */
  firstDifference(other: SparseModel): number | undefined {
    const pages = new Set([...this.#pages.keys(), ...other.#pages.keys()]);
    for (const page of [...pages].sort((a, b) => a - b)) {
      const mine = this.#pages.get(page) ?? ZEROES;
      const theirs = other.#pages.get(page) ?? ZEROES;
      if (mine === theirs || mine.equals(theirs)) continue;
      return page * PAGE + mine.findIndex((byte, index) => byte !== theirs[index]);
    }
    return this.#size === other.#size ? undefined : Math.min(this.#size, other.#size);
  }

  /** All-zero pages are not kept. */
  #put(index: number, page: Buffer): void {
    if (page.equals(ZEROES)) this.#pages.delete(index);
    else this.#pages.set(index, page);
  }

  #checkRange(offset: number, length: number): void {
    if (offset + length > this.#size) throw new Error(`${offset}+${length} ends past the disk of ${this.#size} bytes`);
  }
}
