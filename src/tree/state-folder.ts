/**
 * DISK/.incoming/N: receives the state of one guest for one checkpoint. The guest makes all its files first and stands
 * still from before the first byte of memory is written: the first WRITE to `state` is the moment of the checkpoint,
 * and the disks are frozen before that WRITE is answered. What follows goes to the checkpoint that is not published
 * yet, written by the data threads themselves.
 */
import type { OpenState } from '../disk/disk.ts';
import { FsError } from '../errors.ts';
import type { Attributes, Caller, DirectoryEntry, Node } from '../fuse/filesystem.ts';
import type { StateFile } from '../guest/guest.ts';
import type { DataThreads } from './data-threads.ts';
import { IncomingFile } from './incoming-file.ts';
import { Directory, directoryAttributes, type FileCreated, type InodeNumbers, type Place } from './node.ts';

/** The memory. The other files have its name with an ending. */
export const MEMORY_FILE = 'state';
export const STATE_FILES: readonly string[] = [MEMORY_FILE, 'state.kern', 'state.meta'];

/** Where the state goes. */
export interface StateStore {
  /** The guest stands still: keep what its disks hold now. Called once. */
  freeze(): Promise<void>;
  /** After `freeze`: contents of a new file. */
  create(name: string): OpenState;
  /** Something could not be written: the checkpoint is to be given up, and the folder disposed of then. */
  failed(error: FsError): void;
}

export interface StateFolderOptions {
  readonly name: string;
  readonly place: Place;
  readonly parentIno: number;
  readonly inodes: InodeNumbers;
  readonly threads: DataThreads;
  readonly store: StateStore;
  readonly sealed: () => void;
}

export class StateFolder extends Directory implements Disposable {
  override readonly entryValidMs = 0;
  readonly name: string;
  readonly #options: StateFolderOptions;
  readonly #files = new Map<string, IncomingFile>();
  readonly #madeMs = Date.now();
  #frozen: Promise<void> | undefined;
  /** Writes go to the store. */
  #storing = false;
  #sealed = false;
  #failure: FsError | undefined;
  #waiting: (() => void)[] = [];
  /** Resolves after the checkpoint was published or abandoned. */
  readonly over: Promise<void>;
  #end: () => void = () => {};

  constructor(options: StateFolderOptions) {
    super(options.place, options.parentIno);
    this.name = options.name;
    this.#options = options;
    this.over = new Promise((resolve) => {
      this.#end = resolve;
    });
  }

  /** The first failure of a write to one of the files, or of the freezing: what the guest then says follows from it. */
  get failure(): FsError | undefined {
    return this.#failure;
  }

  /** What was written, for who checks it. */
  readable(): StateFile[] {
    return Array.from(this.#files.values(), (file) => ({
      name: file.name,
      bytes: file.bytes,
      read: (from, to) => file.read(from, to),
    }));
  }

  /** Bytes of state so far. */
  get bytes(): number {
    let bytes = 0;
    for (const file of this.#files.values()) bytes += file.bytes;
    return bytes;
  }

  /**
   * Resolves when each of these was open for writing and none of them is any more. Never, if the folder is sealed before.
   */
  async closed(names: readonly string[]): Promise<void> {
    while (!names.every((name) => this.#files.get(name)?.closed === true)) {
      await new Promise<void>((resolve) => this.#waiting.push(resolve));
    }
  }

  /**
   * After `seal`: resolves when no freezing and no write is under way. Only then may what they made be given up, or its
   * space would be written to after it has become someone else's.
   */
  async quiet(): Promise<void> {
    await this.#frozen?.catch(() => {});
    await this.#options.threads.idle();
  }

  /** No more files, no more writes: who still has a file open gets EIO. What was written can still be read here. */
  seal(): void {
    if (this.#sealed) return;
    this.#sealed = true;
    for (const file of this.#files.values()) file.seal();
    this.#options.sealed();
  }

  /** After the checkpoint was published or abandoned. */
  [Symbol.dispose](): void {
    this.seal();
    for (const file of this.#files.values()) file[Symbol.dispose]();
    this.#end();
  }

  override async attributes(): Promise<Attributes> {
    return directoryAttributes({ permissions: 0o755, timeMs: this.#madeMs }, 0);
  }

  override async lookup(name: string): Promise<Node> {
    const file = this.#files.get(name);
    if (file === undefined || this.#sealed) throw this.absent(name);
    return file;
  }

  override async list(): Promise<readonly DirectoryEntry[]> {
    return this.#sealed ? [] : Array.from(this.#files, ([name, node]) => ({ name, node }));
  }

  override async createFile(name: string, flags: number, mode: number, caller: Caller): Promise<FileCreated> {
    const { place, inodes, threads, store } = this.#options;
    if (this.#sealed || !STATE_FILES.includes(name)) {
      const why = this.#sealed ? 'its checkpoint has ended' : `only ${STATE_FILES.join(', ')} can be made there`;
      throw place.report(
        new FsError('EPERM', `The file ${JSON.stringify(name)} cannot be made in ${place.path()}: ${why}.`),
      );
    }
    let node = this.#files.get(name);
    if (node === undefined) {
      node = new IncomingFile({
        ino: inodes.next(),
        name,
        path: () => `${place.path()}/${name}`,
        mode,
        threads,
        folder: this,
      });
      if (this.#storing) node.keepIn(store.create(name));
      this.#files.set(name, node);
    }
    return { node, open: await node.open(flags, caller) };
  }

  /** Before a write to the file `name`: the first one to the memory freezes the disks. */
  async beforeWrite(name: string): Promise<void> {
    this.refuseIfSealed();
    if (name === MEMORY_FILE) await (this.#frozen ??= this.#freeze());
  }

  /** A file was released. */
  changed(): void {
    const waiting = this.#waiting;
    this.#waiting = [];
    for (const resolve of waiting) resolve();
  }

  /** A write failed. Returns the error, to be thrown. */
  failed(error: FsError): FsError {
    if (!this.#sealed && this.#failure === undefined) {
      this.#failure = error;
      this.#options.store.failed(error);
    }
    return this.place.report(error);
  }

  /** @throws FsError EIO */
  refuseIfSealed(): void {
    if (this.#sealed)
      throw new FsError('EIO', `The checkpoint of ${this.place.path()} has ended: nothing more is taken.`);
  }

  async #freeze(): Promise<void> {
    const { store } = this.#options;
    try {
      await store.freeze();
      this.refuseIfSealed();
      this.#storing = true;
      for (const file of this.#files.values()) file.keepIn(store.create(file.name));
    } catch (error) {
      throw error instanceof FsError ? this.failed(error) : error;
    }
  }
}
