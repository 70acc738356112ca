/** partitions/: one file per partition of a disk's bytes. */
import type { Contents } from '../disk/disk.ts';
import type { Attributes, DirectoryEntry, Node } from '../fuse/filesystem.ts';
import type { ImageFile } from './image-file.ts';
import { Directory, directoryAttributes, type Place } from './node.ts';
import type { Partition } from './partition-table/partition.ts';
import { readPartitions } from './partition-table/partition-table.ts';

/** Decode the table in these contents. */
export function partitionsOf(contents: Contents): readonly Partition[] {
  const diskBytes = contents.size();
  return readPartitions(diskBytes, (offset, length) => {
    if (offset + length > diskBytes) return undefined;
    const bytes = new Uint8Array(length);
    contents.read(bytes, 0, length, offset);
    return bytes;
  });
}

export interface PartitionsOptions {
  /** The table as it is now. @throws FsError */
  readonly table: () => readonly Partition[];
  readonly file: (partition: Partition) => ImageFile;
  readonly timeMs: () => number;
}

interface Entry {
  readonly partition: Partition;
  readonly node: ImageFile;
}

export class PartitionsDirectory extends Directory {
  readonly #options: PartitionsOptions;
  #entries: ReadonlyMap<string, Entry> = new Map();

  constructor(place: Place, parentIno: number, options: PartitionsOptions) {
    super(place, parentIno);
    this.#options = options;
  }

  /** Those that were there when the table was last read. */
  get knownFiles(): readonly ImageFile[] {
    return Array.from(this.#entries.values(), (entry) => entry.node);
  }

  override async attributes(): Promise<Attributes> {
    return directoryAttributes({ permissions: 0o555, timeMs: this.#options.timeMs() }, 0);
  }

  override async lookup(name: string): Promise<Node> {
    const entry = this.#read().get(name);
    if (entry === undefined) throw this.absent(name);
    return entry.node;
  }

  override async list(): Promise<readonly DirectoryEntry[]> {
    return Array.from(this.#read(), ([name, { node }]) => ({ name, node }));
  }

  /**
   * The guest may have written another table: read it each time, which is a few sectors. A partition that stays where
   * it was keeps its node; a moved one gets a new one, and who has the old one open keeps the old place.
   */
  #read(): ReadonlyMap<string, Entry> {
    const entries = new Map<string, Entry>();
    for (const partition of this.#options.table()) {
      const name = `${partition.number}.raw`;
      const known = this.#entries.get(name);
      const same = known?.partition.start === partition.start && known.partition.length === partition.length;
      entries.set(name, same ? known : { partition, node: this.#options.file(partition) });
    }
    this.#entries = entries;
    return entries;
  }
}
