/** README and info.json: text computed when it is opened. */
import { FsError } from '../errors.ts';
import type { AttributeChange, Attributes, Caller, FileNode, OpenFile } from '../fuse/filesystem.ts';
import { seekSolid } from './byte-range.ts';
import { fileAttributes, LASTING_MS, opensForWriting, refuseOwnership } from './node.ts';

export interface TextFileOptions {
  readonly ino: number;
  /** For messages. */
  readonly path: () => string;
  readonly text: () => string;
  readonly timeMs: () => number;
  /** Find out, at each open, what `text` tells of. */
  readonly refresh?: () => Promise<unknown>;
  /** Enter the opened file somewhere; the result is called at its release. */
  readonly enter?: () => Promise<() => void>;
}

export class TextFile implements FileNode {
  readonly kind = 'file';
  readonly ino: number;
  readonly attributesValidMs = 0;
  readonly entryValidMs = LASTING_MS;
  readonly #options: TextFileOptions;

  constructor(options: TextFileOptions) {
    this.ino = options.ino;
    this.#options = options;
  }

  async attributes(): Promise<Attributes> {
    const size = Buffer.byteLength(this.#options.text());
    return fileAttributes({ permissions: 0o444, timeMs: this.#options.timeMs() }, size, size);
  }

  async setAttributes(change: AttributeChange, _caller: Caller): Promise<void> {
    refuseOwnership(change, this.#options.path());
    throw this.#readOnly();
  }

  async open(flags: number, _caller: Caller): Promise<OpenFile> {
    if (opensForWriting(flags)) throw this.#readOnly();
    await this.#options.refresh?.();
    const text = Buffer.from(this.#options.text());
    const leave = await this.#options.enter?.();
    return new OpenText(text, leave, () => this.#readOnly());
  }

  #readOnly(): FsError {
    return new FsError('EROFS', `${this.#options.path()} is a view and cannot be changed.`);
  }
}

class OpenText implements OpenFile {
  readonly slot = undefined;
  /** The next open may find another text: nothing of this one stays in the kernel. */
  readonly caching = 'direct';
  readonly #text: Uint8Array;
  readonly #leave: (() => void) | undefined;
  readonly #readOnly: () => FsError;

  constructor(text: Uint8Array, leave: (() => void) | undefined, readOnly: () => FsError) {
    this.#text = text;
    this.#leave = leave;
    this.#readOnly = readOnly;
  }

  async read(offset: number, size: number): Promise<Uint8Array> {
    return this.#text.subarray(offset, offset + size);
  }
  async write(): Promise<number> {
    throw this.#readOnly();
  }
  async seek(offset: number, whence: number): Promise<number> {
    return seekSolid(offset, whence, this.#text.length);
  }
  async allocate(): Promise<void> {
    throw this.#readOnly();
  }
  async flush(): Promise<void> {}
  async sync(): Promise<void> {}
  async release(): Promise<void> {
    this.#leave?.();
  }
}
