/** An internal checkpoint between its instant and its being seen. */
import { FsError } from '../errors.ts';
import type { Image } from '../qcow2/image.ts';
import type { SnapshotEntry } from '../qcow2/snapshot-table.ts';
import type { SnapshotList } from '../qcow2/snapshots.ts';
import { abandonSnapshot, type FrozenSnapshot, publishSnapshot } from '../qcow2/take-snapshot.ts';
import { dropStates, endState, putState, readState, type SharedStateArea, StateArea } from '../qcow2/vm-state.ts';
import type { SharedView } from './attach-contents.ts';
import { encodeDetails, encodeRecord } from './checkpoint-record.ts';
import type { Checkpoint, CheckpointDetails, OpenState, PendingCheckpoint } from './disk.ts';
import {
  type ArchiveLayout,
  detailsCapacity,
  layOutArchive,
  MEMORY_FILE,
  memoryOffset,
  stateFileNames,
} from './state-archive.ts';
import { WrittenState } from './state-contents.ts';

/** Bytes of a small file that are put in its place at a time. */
const COPY_BYTES = 2 ** 20;

interface Surroundings {
  readonly image: Image;
  readonly list: SnapshotList;
  readonly name: string;
  readonly progress: (fraction: number) => void;
  readonly share: (area: SharedStateArea) => SharedView;
  /** Tells the disk of the new entry of its snapshot table. */
  readonly published: (entry: SnapshotEntry) => Checkpoint;
}

export class PendingSnapshot implements PendingCheckpoint {
  /** Resolves when it is published or abandoned. */
  readonly ended: Promise<void>;
  readonly #frozen: FrozenSnapshot;
  readonly #around: Surroundings;
  /** By name. The memory's becomes the archive; the others are small, and put into it at the end. */
  readonly #areas = new Map<string, StateArea>();
  #end: () => void = () => {};
  #ending: Promise<unknown> | undefined;

  constructor(frozen: FrozenSnapshot, around: Surroundings) {
    this.#frozen = frozen;
    this.#around = around;
    this.ended = new Promise((resolve) => {
      this.#end = resolve;
    });
  }

  createState(name: string): OpenState {
    const { image, share } = this.#around;
    if (this.#ending !== undefined)
      throw new FsError('EROFS', `checkpoint '${this.#around.name}' takes no state any more`);
    if (!stateFileNames.includes(name)) throw new FsError('EINVAL', `'${name}' is no file of a guest's state`);
    if (this.#areas.has(name))
      throw new FsError('EEXIST', `checkpoint '${this.#around.name}' has a file '${name}' already`);
    const area = this.#newArea(name);
    this.#areas.set(name, area);
    return { contents: new WrittenState(image, area), shared: share(area.shared), [Symbol.dispose]: () => {} };
  }

  async publish(details: CheckpointDetails): Promise<Checkpoint> {
    if (this.#ending !== undefined) throw new Error('the checkpoint was published or abandoned before');
    const running = this.#publish(details).finally(this.#end);
    this.#ending = running.catch(() => {});
    return running;
  }

  async abandon(): Promise<void> {
    this.#ending ??= this.#abandon().finally(this.#end);
    await this.#ending;
  }

  #newArea(name: string): StateArea {
    const { image } = this.#around;
    const base = name === MEMORY_FILE ? memoryOffset(image.geometry.clusterBytes) : 0;
    return StateArea.create(image, this.#frozen.l1.length / 8, base);
  }

  async #publish(details: CheckpointDetails): Promise<Checkpoint> {
    const { image, list, name, progress, published } = this.#around;
    let entry: SnapshotEntry;
    try {
      const state = this.#areas.size > 0 ? this.#assemble(details) : undefined;
      const application = encodeRecord(details, state?.layout.files ?? []);
      const fields = { name, application, state: state && { area: state.archive, bytes: state.layout.bytes } };
      entry = await publishSnapshot(image, list, this.#frozen, fields, progress);
    } catch (error) {
      await this.#abandon();
      throw error;
    }
    await this.#dropAreas(this.#areas.get(MEMORY_FILE));
    return published(entry);
  }

  /** Put everything in its place in the archive. */
  #assemble(details: CheckpointDetails): { archive: StateArea; layout: ArchiveLayout } {
    const { image } = this.#around;
    const { clusterBytes } = image.geometry;
    const files = stateFileNames.flatMap((name) => {
      const area = this.#areas.get(name);
      return area === undefined ? [] : [{ name, area }];
    });
    for (const { name, area } of files) {
      endState(image, area);
      const failure = area.failure();
      if (failure !== undefined) {
        throw new FsError(
          failure,
          `${image.file.path}: the guest's '${name}' could not be written in full; make room and try again`,
        );
      }
    }
    const archive = this.#areas.get(MEMORY_FILE) ?? this.#newArea(MEMORY_FILE);
    this.#areas.set(MEMORY_FILE, archive);
    const { timeMs } = this.#frozen;
    const layout = layOutArchive(
      files.map(({ name, area }) => {
        const bytes = area.size();
        return { name, bytes, allocatedBytes: Math.min(bytes, area.allocatedBytes(image)) };
      }),
      encodeDetails(details, timeMs, detailsCapacity(clusterBytes)),
      timeMs,
      clusterBytes,
    );
    for (const { offset, bytes } of layout.pieces) putState(image, archive, bytes, offset);
    for (const { name, offset, bytes } of layout.files) {
      const area = this.#areas.get(name);
      if (area !== undefined && area !== archive) copy(image, area, bytes, archive, offset);
    }
    return { archive, layout };
  }

  async #abandon(): Promise<void> {
    const { image } = this.#around;
    for (const area of this.#areas.values()) endState(image, area);
    await abandonSnapshot(image, this.#frozen);
    await this.#dropAreas(undefined);
  }

  async #dropAreas(except: StateArea | undefined): Promise<void> {
    const areas = [...this.#areas.values()].filter((area) => area !== except);
    await dropStates(this.#around.image, areas);
  }
}

function copy(image: Image, from: StateArea, bytes: number, to: StateArea, offset: number): void {
  const buffer = new Uint8Array(Math.min(bytes, COPY_BYTES));
  for (let done = 0; done < bytes; done += buffer.length) {
    const piece = buffer.subarray(0, Math.min(buffer.length, bytes - done));
    readState(image, from, piece, 0, piece.length, done);
    putState(image, to, piece, offset + done);
  }
}
