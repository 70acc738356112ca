import { FsError } from '../errors.ts';
import { DATA_HANDLES } from './data-plane.ts';
import type { ListedEntry } from './directory-stream.ts';
import type { OpenFile } from './filesystem.ts';

/** An open directory: the listing of its last rewind, so that cookies stay what they were. */
export interface OpenDirectory {
  listing: readonly ListedEntry[];
}

/** What is open on this mount, by fh. A file's slot of the data plane is its fh; all others count from DATA_HANDLES. */
export class HandleTable {
  readonly #files = new Map<number, OpenFile>();
  readonly #directories = new Map<number, OpenDirectory>();
  #next = DATA_HANDLES;

  /** @throws Error if the slot is in use or out of range: two open files would share their bytes */
  addFile(open: OpenFile): number {
    const { slot } = open;
    if (slot !== undefined && (slot < 0 || slot >= DATA_HANDLES || this.#files.has(slot))) {
      throw new Error(`slot ${slot} of the handle table cannot be given to an open file: it is in use or out of range`);
    }
    const fh = slot ?? this.#next++;
    this.#files.set(fh, open);
    return fh;
  }

  addDirectory(): number {
    const fh = this.#next++;
    this.#directories.set(fh, { listing: [] });
    return fh;
  }

  /** @throws FsError EBADF */
  file(fh: bigint): OpenFile {
    const open = this.#files.get(Number(fh));
    if (open === undefined) throw new FsError('EBADF', `no file is open under handle ${fh}`);
    return open;
  }

  /** @throws FsError EBADF */
  directory(fh: bigint): OpenDirectory {
    const open = this.#directories.get(Number(fh));
    if (open === undefined) throw new FsError('EBADF', `no directory is open under handle ${fh}`);
    return open;
  }

  /** The caller releases it. @throws FsError EBADF */
  removeFile(fh: bigint): OpenFile {
    const open = this.file(fh);
    this.#files.delete(Number(fh));
    return open;
  }

  removeDirectory(fh: bigint): void {
    this.#directories.delete(Number(fh));
  }

  /** Empty the table and return the files, for the caller to release. */
  removeAll(): OpenFile[] {
    const open = [...this.#files.values()];
    this.#files.clear();
    this.#directories.clear();
    return open;
  }
}
