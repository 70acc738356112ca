/** The records that READDIR and READDIRPLUS answer with, packed into the size that the kernel asked for. */

import type { Attributes } from './filesystem.ts';
import { type Described, ENTRY_BYTES, encodeEntry } from './reply.ts';
import { dirent } from './structures.ts';

/** One line of a listing as it stood when the directory was read from its start. */
export interface ListedEntry {
  readonly name: string;
  readonly ino: number;
  readonly kind: 'directory' | 'file';
}

const direntType = { directory: 4, file: 8 } as const; // DT_DIR, DT_REG
const padded = (bytes: number): number => Math.ceil(bytes / 8) * 8;

/** Appends records until one does not fit. */
export class DirectoryStream {
  readonly #body: Uint8Array;
  #used = 0;

  constructor(sizeBytes: number) {
    this.#body = new Uint8Array(sizeBytes);
  }

  /** Room for this entry, with its attributes in front when `plus`. */
  fits(entry: ListedEntry, plus: boolean): boolean {
    return this.#used + this.#recordBytes(Buffer.byteLength(entry.name), plus) <= this.#body.length;
  }

  /** `cookie` is the offset from which the next READDIR goes on. */
  add(entry: ListedEntry, cookie: number): void {
    this.#append(entry, cookie, 0);
  }

  /** `known` undefined: no attributes for this one (nodeid 0), and no lookup counted. */
  addPlus(entry: ListedEntry, cookie: number, known: { node: Described; attributes: Attributes } | undefined): void {
    if (known !== undefined) this.#body.set(encodeEntry(known.node, known.attributes), this.#used);
    this.#append(entry, cookie, ENTRY_BYTES);
  }

  bytes(): Uint8Array {
    return this.#body.subarray(0, this.#used);
  }

  #append(entry: ListedEntry, cookie: number, headBytes: number): void {
    const name = Buffer.from(entry.name);
    const at = this.#used + headBytes;
    dirent.encode(
      { ino: BigInt(entry.ino), off: BigInt(cookie), namelen: name.length, type: direntType[entry.kind] },
      this.#body,
      at,
    );
    this.#body.set(name, at + dirent.bytes);
    this.#used += this.#recordBytes(name.length, headBytes > 0);
  }

  #recordBytes(nameBytes: number, plus: boolean): number {
    return padded((plus ? ENTRY_BYTES : 0) + dirent.bytes + nameBytes);
  }
}
