/**
 * DISK/.incoming: where a guest that is being checkpointed writes its memory and devices. Not listed in DISK, and empty
 * but for the folders of checkpoints under way, whose names are short: bhyve takes no long paths.
 */
import type { Attributes, DirectoryEntry, Node } from '../fuse/filesystem.ts';
import type { DataThreads } from './data-threads.ts';
import { Directory, directoryAttributes, type InodeNumbers, type Place } from './node.ts';
import { StateFolder, type StateStore } from './state-folder.ts';

export class IncomingDirectory extends Directory {
  override readonly entryValidMs = 0;
  readonly #inodes: InodeNumbers;
  readonly #threads: DataThreads;
  readonly #folders = new Map<string, StateFolder>();
  #changedMs = Date.now();
  #last = 0;

  constructor(place: Place, parentIno: number, inodes: InodeNumbers, threads: DataThreads) {
    super(place, parentIno);
    this.#inodes = inodes;
    this.#threads = threads;
  }

  /** A new folder, which takes files until it is sealed. No name is used twice while mounted. */
  begin(store: StateStore): StateFolder {
    const name = String(++this.#last);
    const folder = new StateFolder({
      name,
      parentIno: this.ino,
      place: { ino: this.#inodes.next(), path: () => `${this.place.path()}/${name}`, report: this.place.report },
      inodes: this.#inodes,
      threads: this.#threads,
      store,
      sealed: () => this.#folders.delete(name),
    });
    this.#folders.set(name, folder);
    this.#changedMs = Date.now();
    return folder;
  }

  override async attributes(): Promise<Attributes> {
    return directoryAttributes({ permissions: 0o555, timeMs: this.#changedMs }, this.#folders.size);
  }

  override async lookup(name: string): Promise<Node> {
    const folder = this.#folders.get(name);
    if (folder === undefined) throw this.absent(name);
    return folder;
  }

  override async list(): Promise<readonly DirectoryEntry[]> {
    return Array.from(this.#folders, ([name, node]) => ({ name, node }));
  }
}
