/** One file of the state that a guest is writing: `state`, `state.kern` or `state.meta`. */
import { constants } from 'node:fs';
import type { OpenState } from '../disk/disk.ts';
import { FsError } from '../errors.ts';
import type { AttributeChange, Attributes, Caller, FileNode, OpenFile } from '../fuse/filesystem.ts';
import { readRange, seekRange, writeGrowing } from './byte-range.ts';
import type { DataThreads } from './data-threads.ts';
import { fileAttributes, opensForWriting } from './node.ts';
import { NO_CONTENTS } from './slot-table.ts';
import type { StateFolder } from './state-folder.ts';

/** Written before the guest stands still, and kept in memory until then: a description, never memory. */
const EARLY_BYTES = 64 * 2 ** 20;

/** Bytes of a state file that a validator asks for at once. */
const PIECE_BYTES = 2 ** 20;

export interface IncomingFileOptions {
  readonly ino: number;
  readonly name: string;
  readonly path: () => string;
  /** Permission bits it was made with. */
  readonly mode: number;
  readonly threads: DataThreads;
  readonly folder: StateFolder;
}

export class IncomingFile implements FileNode, Disposable {
  readonly kind = 'file';
  readonly ino: number;
  readonly attributesValidMs = 0;
  readonly entryValidMs = 0;
  readonly name: string;
  readonly #options: IncomingFileOptions;
  readonly #open = new Set<OpenIncoming>();
  #wasWritable = false;
  #sealed = false;
  readonly #madeMs = Date.now();
  #mode: number;
  #kept: OpenState | undefined;
  /** Until it is kept somewhere. */
  #early = new Uint8Array();

  constructor(options: IncomingFileOptions) {
    this.ino = options.ino;
    this.name = options.name;
    this.#options = options;
    this.#mode = options.mode;
  }

  get bytes(): number {
    return this.#kept?.contents.size() ?? this.#early.length;
  }

  /** It was open for writing, and nobody has it open any more. */
  get closed(): boolean {
    return this.#wasWritable && this.#open.size === 0;
  }

  /** The bytes from `from` to before `to`, all if neither is said. */
  read(from = 0, to = this.bytes): Uint8Array {
    const end = Math.min(to, this.bytes);
    const bytes = new Uint8Array(Math.max(0, end - from));
    for (let at = 0; at < bytes.length; at += PIECE_BYTES) {
      this.readAt(from + at, bytes, at, Math.min(PIECE_BYTES, bytes.length - at));
    }
    return bytes;
  }

  /** `length` bytes from `offset`, which lie inside the file. */
  readAt(offset: number, target: Uint8Array, at: number, length: number): void {
    if (this.#kept !== undefined)
      readRange(this.#kept.contents, 0, Number.POSITIVE_INFINITY, offset, length, target, at);
    else target.set(this.#early.subarray(offset, offset + length), at);
  }

  /** From now on everything goes to `kept`, which becomes this file's to dispose. */
  keepIn(kept: OpenState): void {
    const { threads, folder } = this.#options;
    this.#kept = kept;
    if (this.#early.length > 0) writeGrowing(kept.contents, 0, this.#early.length, this.#early, 0);
    this.#early = new Uint8Array();
    threads.publish(kept, (error) => folder.failed(error));
    for (const { slot } of this.#open) if (slot !== undefined) threads.showInSlot(slot, kept.shared.id);
  }

  /** Takes nothing more; can still be read. */
  seal(): void {
    const { threads } = this.#options;
    if (this.#kept === undefined || this.#sealed) return;
    this.#sealed = true;
    for (const { slot } of this.#open) if (slot !== undefined) threads.showInSlot(slot, NO_CONTENTS);
    threads.withdraw(this.#kept.shared);
  }

  /** After the checkpoint was published or abandoned. */
  [Symbol.dispose](): void {
    this.seal();
    this.#kept?.[Symbol.dispose]();
    this.#kept = undefined;
  }

  async attributes(): Promise<Attributes> {
    return fileAttributes({ permissions: this.#mode, timeMs: this.#madeMs }, this.bytes, this.bytes);
  }

  async setAttributes(change: AttributeChange, _caller: Caller): Promise<void> {
    if (change.uid !== undefined || change.gid !== undefined) {
      throw new FsError('EPERM', `The owner of ${this.#options.path()} cannot be changed: it is whoever mounted.`);
    }
    if (change.mode !== undefined) this.#mode = change.mode & 0o7777;
    if (change.size !== undefined) this.truncate(change.size);
  }

  async open(flags: number, _caller: Caller): Promise<OpenFile> {
    const { threads, folder } = this.#options;
    const writable = opensForWriting(flags);
    if (writable && (flags & constants.O_TRUNC) !== 0) this.truncate(0);
    const slot = threads.takeSlot({
      contentsId: this.#sealed ? NO_CONTENTS : (this.#kept?.shared.id ?? NO_CONTENTS),
      base: 0,
      length: Number.POSITIVE_INFINITY,
      writable,
      grows: true,
    });
    const open = new OpenIncoming(this, slot, () => {
      if (slot !== undefined) threads.freeSlot(slot);
      this.#open.delete(open);
      folder.changed();
    });
    this.#open.add(open);
    this.#wasWritable ||= writable;
    return open;
  }

  async write(offset: number, data: Uint8Array): Promise<number> {
    const { folder } = this.#options;
    try {
      await folder.beforeWrite(this.name);
      return this.#changing(() => {
        if (this.#kept !== undefined) return writeGrowing(this.#kept.contents, offset, data.length, data, 0);
        if (offset + data.length > this.#early.length) this.#resizeEarly(offset + data.length);
        this.#early.set(data, offset);
        return data.length;
      });
    } catch (error) {
      // The guest runs on when it hears of this, and then its disk needs the space that the checkpoint has taken.
      if (error instanceof FsError) await folder.over;
      throw error;
    }
  }

  truncate(bytes: number): void {
    this.#options.folder.refuseIfSealed();
    this.#changing(() => {
      if (this.#kept !== undefined) this.#kept.contents.setSize(bytes);
      else this.#resizeEarly(bytes);
    });
  }

  seek(offset: number, whence: number): number {
    if (this.#kept === undefined) throw new FsError('EINVAL', `${this.#options.path()} has no holes yet.`);
    return seekRange(this.#kept.contents, 0, Number.POSITIVE_INFINITY, offset, whence);
  }

  #resizeEarly(bytes: number): void {
    if (bytes > EARLY_BYTES) {
      throw new FsError('EFBIG', `${this.#options.path()} would have ${bytes} bytes before any memory was written.`);
    }
    const resized = new Uint8Array(bytes);
    resized.set(this.#early.subarray(0, bytes));
    this.#early = resized;
  }

  /** The folder remembers what went wrong first. */
  #changing<T>(change: () => T): T {
    try {
      return change();
    } catch (error) {
      throw error instanceof FsError ? this.#options.folder.failed(error) : error;
    }
  }
}

/** One open(2) of it. */
class OpenIncoming implements OpenFile {
  readonly slot: number | undefined;
  readonly caching = 'direct';
  readonly #file: IncomingFile;
  readonly #released: () => void;

  constructor(file: IncomingFile, slot: number | undefined, released: () => void) {
    this.#file = file;
    this.slot = slot;
    this.#released = released;
  }

  async read(offset: number, size: number): Promise<Uint8Array> {
    const bytes = new Uint8Array(Math.max(0, Math.min(size, this.#file.bytes - offset)));
    this.#file.readAt(offset, bytes, 0, bytes.length);
    return bytes;
  }

  async write(offset: number, data: Uint8Array): Promise<number> {
    return this.#file.write(offset, data);
  }

  async seek(offset: number, whence: number): Promise<number> {
    return this.#file.seek(offset, whence);
  }

  async allocate(): Promise<void> {
    throw new FsError('ENOTSUP', 'State of a guest is written, not allocated.');
  }

  async flush(): Promise<void> {}

  /** Publishing makes all of it durable; until then nobody may rely on it. */
  async sync(): Promise<void> {}

  async release(): Promise<void> {
    this.#released();
  }
}
