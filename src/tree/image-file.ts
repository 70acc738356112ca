/** disk.raw, a partition or VM state: a range of a disk's bytes as a file. */
import { constants } from 'node:fs';
import type { Checkpoint, Contents } from '../disk/disk.ts';
import { FsError } from '../errors.ts';
import type { AttributeChange, Attributes, Caller, FileNode, OpenFile } from '../fuse/filesystem.ts';
import { allocateRange, GATE_CLOSED, rangeBytes, readRange, seekRange, writeRange } from './byte-range.ts';
import type { SharedOpening } from './data-threads.ts';
import type { MountedDisk } from './mounted-disk.ts';
import { fileAttributes, LASTING_MS, opensForWriting, refuseOwnership } from './node.ts';

export interface ImageFileOptions {
  readonly ino: number;
  readonly mounted: MountedDisk;
  /** Path inside the disk's directory, for messages. */
  readonly label: () => string;
  readonly opening: SharedOpening;
  /** Where the file starts in the contents, in bytes. */
  readonly base: number;
  /** Bytes; Infinity for the whole live disk, whose length follows the disk's. */
  readonly length: number;
  /** Bytes the file has now. Reads no table. */
  readonly size: () => number;
  readonly allocatedBytes: () => number;
  readonly timeMs: () => number;
  /** Whose file it is, undefined for the live contents. @throws FsError ENOENT when that checkpoint is gone */
  readonly checkpoint: () => Checkpoint | undefined;
  readonly kind: 'live' | 'checkpoint';
  /** Of a checkpoint, yet not as it was: the file of an overlay that is being written. */
  readonly changing?: boolean;
  /** The name may come to mean something else: a live partition's. */
  readonly passing?: boolean;
}

export class ImageFile implements FileNode {
  readonly kind = 'file';
  readonly ino: number;
  readonly attributesValidMs: number;
  readonly entryValidMs: number;
  readonly #options: ImageFileOptions;

  constructor(options: ImageFileOptions) {
    this.ino = options.ino;
    this.attributesValidMs = options.kind === 'live' || options.changing === true ? 0 : LASTING_MS;
    this.entryValidMs = options.passing === true ? 0 : LASTING_MS;
    this.#options = options;
  }

  async attributes(): Promise<Attributes> {
    const { checkpoint, size, allocatedBytes, timeMs } = this.#options;
    checkpoint();
    const permissions = this.#readOnly === undefined ? 0o644 : 0o444;
    return fileAttributes({ permissions, timeMs: timeMs() }, size(), allocatedBytes());
  }

  /** Growing disk.raw grows the disk; everything else keeps its size. Times are accepted and stay the image's. */
  setAttributes(change: AttributeChange, _caller: Caller): Promise<void> {
    const { mounted, label, size, length } = this.#options;
    return mounted.attempt(async () => {
      refuseOwnership(change, label());
      this.#refuseIfReadOnly(change.size === undefined ? 'changed' : 'truncated');
      if (change.size === undefined || change.size === size()) return;
      if (change.size < size()) throw this.#shrinking(change.size);
      if (length !== Number.POSITIVE_INFINITY) {
        throw new FsError('EPERM', `${label()} cannot grow: its size is in the partition table; change it there.`);
      }
      await mounted.resize(change.size, { shrink: false });
    });
  }

  open(flags: number, _caller: Caller): Promise<OpenFile> {
    const { mounted, label, opening, base, length, size, checkpoint, kind } = this.#options;
    return mounted.attempt(async () => {
      const writable = opensForWriting(flags);
      if (writable) this.#refuseIfReadOnly('opened for writing');
      if (writable && (flags & constants.O_TRUNC) !== 0 && size() > 0) throw this.#shrinking(0);
      checkpoint();
      if (kind === 'live') await mounted.disk.refresh('contents');
      const writes = writable ? { start: base, end: base + length } : undefined;
      const leave = await mounted.openFiles.add({ label: label(), checkpoint, writes });
      try {
        const { contents, shared } = opening.acquire();
        const slot = mounted.threads.takeSlot({ contentsId: shared.id, base, length, writable });
        const release = () => {
          if (slot !== undefined) mounted.threads.freeSlot(slot);
          opening.release();
          leave();
        };
        const caching = kind === 'live' || this.#options.changing === true ? 'direct' : 'keep';
        return new OpenImage({
          contents,
          base,
          length,
          slot,
          caching,
          mounted,
          release,
        });
      } catch (error) {
        leave();
        throw error;
      }
    });
  }

  get #readOnly(): string | undefined {
    return this.#options.kind === 'checkpoint' ? 'a checkpoint never changes' : this.#options.mounted.disk.readOnly;
  }

  #refuseIfReadOnly(what: string): void {
    if (this.#readOnly === undefined) return;
    throw new FsError('EROFS', `${this.#options.label()} cannot be ${what}: ${this.#readOnly}.`);
  }

  #shrinking(size: number): FsError {
    const { label } = this.#options;
    return new FsError(
      'EPERM',
      `${label()} is not cut to ${size} bytes: write it without truncating (dd conv=notrunc), or shrink the disk by vdskfs resize --shrink.`,
    );
  }
}

interface OpenImageOptions {
  readonly contents: Contents;
  readonly base: number;
  readonly length: number;
  readonly slot: number | undefined;
  readonly caching: OpenFile['caching'];
  readonly mounted: MountedDisk;
  readonly release: () => void;
}

/** The main thread's side of an open file: what the data threads defer, and everything where there are none. */
class OpenImage implements OpenFile {
  readonly slot: number | undefined;
  readonly caching: OpenFile['caching'];
  readonly #options: OpenImageOptions;

  constructor(options: OpenImageOptions) {
    this.slot = options.slot;
    this.caching = options.caching;
    this.#options = options;
  }

  read(offset: number, size: number): Promise<Uint8Array> {
    const { contents, base, length, mounted } = this.#options;
    return mounted.attempt(async () => {
      const bytes = new Uint8Array(Math.max(0, Math.min(size, rangeBytes(contents, base, length) - offset)));
      readRange(contents, base, length, offset, bytes.length, bytes, 0);
      return bytes;
    });
  }

  write(offset: number, data: Uint8Array, sync: boolean): Promise<number> {
    const { contents, base, length, mounted } = this.#options;
    return mounted.attempt(async () => {
      const count = await this.#throughGate(() => writeRange(contents, base, length, offset, data.length, data, 0));
      if (sync) contents.flush();
      return count;
    });
  }

  async seek(offset: number, whence: number): Promise<number> {
    const { contents, base, length } = this.#options;
    return seekRange(contents, base, length, offset, whence);
  }

  allocate(offset: number, bytes: number, mode: number): Promise<void> {
    const { contents, base, length, mounted } = this.#options;
    return mounted.attempt(async () => {
      await this.#throughGate(() => allocateRange(contents, base, length, offset, bytes, mode));
    });
  }

  /** Nothing to do: what write(2) acknowledged is in the engine, and close(2) promises no durability. */
  async flush(): Promise<void> {}

  sync(): Promise<void> {
    const { contents, mounted } = this.#options;
    return mounted.attempt(async () => contents.flush());
  }

  async release(): Promise<void> {
    this.#options.release();
  }

  /** Repeat what met the closed gate once writes are taken again. */
  async #throughGate(change: () => number): Promise<number> {
    for (;;) {
      const result = change();
      if (result !== GATE_CLOSED) return result;
      await this.#options.mounted.disk.whenOpen();
    }
  }
}
