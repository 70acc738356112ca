/** A disk in memory: what the tree may expect of any `Disk`, without an image behind it. */
import { shownNames } from '../../src/disk/checkpoint-name.ts';
import type {
  Checkpoint,
  CheckpointDetails,
  CheckpointKind,
  CompactReport,
  Contents,
  Disk,
  DiskInfo,
  DiskSpace,
  OpenContents,
  OpenState,
  Operation,
  PendingCheckpoint,
  SharedContents,
  StateContents,
  TakeOptions,
} from '../../src/disk/disk.ts';
import { FsError } from '../../src/errors.ts';
import type { Difference } from '../../src/qcow2/difference.ts';

const PAGE = 4096;
const NONE = new Uint8Array();

/** Sparse bytes. */
export class FakeContents implements Contents {
  readonly disk: FakeDisk;
  readonly pages: Map<number, Uint8Array>;
  bytes: number;
  flushes = 0;
  /** Thrown by the next call of read, write or flush. */
  failure: Error | undefined;

  constructor(disk: FakeDisk, bytes: number, pages = new Map<number, Uint8Array>()) {
    this.disk = disk;
    this.bytes = bytes;
    this.pages = pages;
  }

  copy(): FakeContents {
    return new FakeContents(this.disk, this.bytes, new Map([...this.pages].map(([n, page]) => [n, page.slice()])));
  }

  size(): number {
    return this.bytes;
  }

  read(target: Uint8Array, at: number, length: number, offset: number): void {
    this.#check(offset, length);
    for (let i = 0; i < length; i++) {
      const from = offset + i;
      target[at + i] = this.pages.get(Math.floor(from / PAGE))?.[from % PAGE] ?? 0;
    }
  }

  write(source: Uint8Array, at: number, length: number, offset: number): boolean {
    this.#check(offset, length);
    if (this.disk.gateClosed) return false;
    for (let i = 0; i < length; i++) {
      const to = offset + i;
      const number = Math.floor(to / PAGE);
      let page = this.pages.get(number);
      if (page === undefined) this.pages.set(number, (page = new Uint8Array(PAGE)));
      page[to % PAGE] = source[at + i] as number;
    }
    return true;
  }

  discard(offset: number, length: number): boolean {
    if (!this.writeZeroes(offset, length)) return false;
    const last = Math.floor((offset + length) / PAGE);
    for (let number = Math.ceil(offset / PAGE); number < last; number++) this.pages.delete(number);
    return true;
  }

  writeZeroes(offset: number, length: number): boolean {
    return this.write(new Uint8Array(length), 0, length, offset);
  }

  flush(): void {
    this.#check(0, 0);
    this.flushes++;
  }

  nextData(offset: number): number {
    for (let at = offset; at < this.bytes; at = (Math.floor(at / PAGE) + 1) * PAGE) {
      if (this.pages.has(Math.floor(at / PAGE))) return at;
    }
    return -1;
  }

  nextHole(offset: number): number {
    for (let at = offset; at < this.bytes; at = (Math.floor(at / PAGE) + 1) * PAGE) {
      if (!this.pages.has(Math.floor(at / PAGE))) return at;
    }
    return this.bytes;
  }

  #check(offset: number, length: number): void {
    const { failure } = this;
    this.failure = undefined;
    if (failure !== undefined) throw failure;
    if (offset < 0 || length < 0 || offset + length > this.bytes) {
      throw new Error(`the tree asked for ${length} bytes at ${offset} of ${this.bytes}`);
    }
  }
}

/** A state file that is being written. */
class FakeState extends FakeContents implements StateContents {
  override write(source: Uint8Array, at: number, length: number, offset: number): boolean {
    this.bytes = Math.max(this.bytes, offset + length);
    const { gateClosed } = this.disk;
    this.disk.gateClosed = false;
    try {
      return super.write(source, at, length, offset);
    } finally {
      this.disk.gateClosed = gateClosed;
    }
  }

  setSize(bytes: number): void {
    const before = this.bytes;
    this.bytes = bytes;
    if (bytes > before) return;
    this.bytes = before;
    this.discard(bytes, before - bytes);
    this.bytes = bytes;
  }
}

interface Snapshot {
  readonly id: string;
  name: string;
  readonly createdMs: number;
  readonly details: CheckpointDetails;
  readonly state: ReadonlyMap<string, FakeContents>;
  readonly contents: FakeContents;
}

let lastId = 0;
const attached = new Map<number, FakeContents>();

/** The `attachContents` that goes with fake disks. */
export function attachFake({ id }: SharedContents): Contents {
  const contents = attached.get(id);
  if (contents === undefined) throw new Error(`contents ${id} are not open`);
  return contents;
}

export class FakeDisk implements Disk {
  readonly name: string;
  readonly imagePath: string;
  owner: Disk['owner'] = 'served';
  readOnly: string | undefined;
  live: FakeContents;
  gateClosed = false;
  /** Contents handed out and not yet given back. */
  opened = 0;
  /** Checkpoints frozen and neither published nor abandoned. */
  pending = 0;
  running: Operation | undefined;
  /** When set, slow operations wait for it. */
  hold: Promise<void> | undefined;
  readonly #snapshots: Snapshot[] = [];
  readonly #listeners: ((change: 'contents' | 'size' | 'checkpoints') => void)[] = [];
  #checkpoints: readonly Checkpoint[] = [];
  #whenOpen: (() => void)[] = [];
  #nextId = 1;
  #nextCreatedMs = Date.UTC(2024, 0, 1);

  constructor({ name = 'vm1', bytes = 1 << 20, readOnly }: { name?: string; bytes?: number; readOnly?: string } = {}) {
    this.name = name;
    this.imagePath = `/tmp/${name}.qcow2`;
    this.live = new FakeContents(this, bytes);
    this.readOnly = readOnly;
  }

  /** A snapshot that some other program has made. */
  addForeign(name: string, { id = String(this.#nextId++), state = {} as Record<string, Uint8Array> } = {}): void {
    const files = Object.entries(state).map(([file, bytes]): [string, FakeContents] => {
      const contents = new FakeContents(this, bytes.length);
      contents.write(bytes, 0, bytes.length, 0);
      return [file, contents];
    });
    const consistency = files.length > 0 ? 'memory' : 'crash';
    this.#add(id, name, this.live.copy(), new Map(files), { consistency });
  }

  #add(
    id: string,
    name: string,
    contents: FakeContents,
    state: ReadonlyMap<string, FakeContents>,
    details: CheckpointDetails,
  ): void {
    this.#snapshots.push({ id, name, state, contents, details, createdMs: this.#nextCreatedMs });
    this.#nextCreatedMs += 1000;
    this.#list();
  }

  openGate(): void {
    this.gateClosed = false;
    for (const resolve of this.#whenOpen) resolve();
    this.#whenOpen = [];
  }

  refreshed = 0;

  async refresh(): Promise<void> {
    this.refreshed++;
  }

  modifiedMs(): number {
    return Date.UTC(2024, 5, 1);
  }

  info(): DiskInfo {
    return {
      name: this.name,
      image: this.imagePath,
      virtualSize: this.live.bytes,
      allocatedSize: this.allocatedBytes(),
      format: { version: 3, clusterSize: 65536, refcountBits: 16, features: [] },
      chain: [{ file: this.imagePath, format: 'qcow2', virtualSize: this.live.bytes }],
    };
  }

  virtualSize(): number {
    return this.live.bytes;
  }

  allocatedBytes(checkpoint?: Checkpoint): number {
    return (checkpoint === undefined ? this.live : this.#snapshot(checkpoint).contents).pages.size * PAGE;
  }

  checkpoints(): readonly Checkpoint[] {
    return this.#checkpoints;
  }

  openLive(): OpenContents {
    return this.#open(this.live);
  }

  openCheckpoint(checkpoint: Checkpoint): OpenContents {
    return this.#open(this.#snapshot(checkpoint).contents);
  }

  openOverlay(): OpenContents {
    throw new FsError('ENOENT', 'no overlays');
  }

  openState(checkpoint: Checkpoint, name: string): OpenContents {
    const contents = this.#snapshot(checkpoint).state.get(name);
    if (contents === undefined) throw new FsError('ENOENT', `no ${name}`);
    return this.#open(contents);
  }

  details(checkpoint: Checkpoint): CheckpointDetails {
    return this.#snapshot(checkpoint).details;
  }

  async takeCheckpoint(
    name: string,
    { kind = 'internal', consistency = 'crash' }: TakeOptions = {},
  ): Promise<Checkpoint> {
    await this.#run('checkpoint');
    return (await this.freeze(kind, name)).publish({ consistency });
  }

  async prepareFreeze(): Promise<void> {}

  async freeze(kind: CheckpointKind, name: string): Promise<PendingCheckpoint> {
    if (kind === 'external') throw new FsError('ENOTSUP', 'no overlays');
    const contents = this.live.copy();
    const files = new Map<string, FakeState>();
    this.pending++;
    return {
      createState: (file): OpenState => {
        if (files.has(file)) throw new FsError('EEXIST', `${file} is there`);
        const state = new FakeState(this, 0);
        files.set(file, state);
        return { ...this.#open(state), contents: state };
      },
      publish: async (details) => {
        this.pending--;
        this.#add(String(this.#nextId++), name, contents, files, details);
        return this.#checkpoints.at(-1) as Checkpoint;
      },
      abandon: async () => {
        this.pending--;
      },
    };
  }

  async holdWrites(): Promise<AsyncDisposable> {
    this.gateClosed = true;
    return { [Symbol.asyncDispose]: async () => this.openGate() };
  }

  async deleteCheckpoint(checkpoint: Checkpoint): Promise<void> {
    await this.#run('delete');
    this.#snapshots.splice(this.#snapshots.indexOf(this.#snapshot(checkpoint)), 1);
    // As QEMU does: the next ID is one above the highest there is.
    this.#nextId = 1 + Math.max(0, ...this.#snapshots.map(({ id }) => Number(id)));
    this.#list();
  }

  async renameCheckpoint(checkpoint: Checkpoint, newName: string): Promise<Checkpoint> {
    const snapshot = this.#snapshot(checkpoint);
    snapshot.name = newName;
    this.#list();
    return this.#checkpoints[this.#snapshots.indexOf(snapshot)] as Checkpoint;
  }

  async rollback(checkpoint: Checkpoint): Promise<void> {
    await this.#run('rollback');
    const { pages, bytes } = this.#snapshot(checkpoint).contents.copy();
    this.live.pages.clear();
    for (const [number, page] of pages) this.live.pages.set(number, page);
    this.live.bytes = bytes;
    this.#changed('contents');
  }

  async resize(bytes: number, { shrink }: { shrink: boolean }): Promise<void> {
    if (bytes < this.live.bytes && !shrink) throw new FsError('EPERM', 'not without --shrink');
    this.live.bytes = bytes;
    this.#changed('size');
  }

  async compact(): Promise<CompactReport> {
    return { bytesBefore: 3000, bytesAfter: 2000 };
  }

  async differences(from: Checkpoint | undefined, to: Checkpoint | undefined): Promise<Difference[]> {
    const [before, after] = [from, to].map((one) => (one === undefined ? this.live : this.#snapshot(one).contents));
    const pages = new Set([...before!.pages.keys(), ...after!.pages.keys()]);
    return [...pages]
      .sort((a, b) => a - b)
      .filter((page) => Buffer.compare(before!.pages.get(page) ?? NONE, after!.pages.get(page) ?? NONE) !== 0)
      .map((page) => ({ offset: page * PAGE, length: PAGE, kind: after!.pages.has(page) ? 'data' : 'zero' }));
  }

  async space(): Promise<DiskSpace> {
    const checkpoints = this.#checkpoints.map((checkpoint) => ({ checkpoint, own: 1, shared: 2, freed: 3 }));
    return { checkpoints, live: { own: 4, shared: 5 } };
  }

  operation(): Operation | undefined {
    return this.running;
  }

  whenOpen(): Promise<void> {
    return this.gateClosed ? new Promise((resolve) => this.#whenOpen.push(resolve)) : Promise.resolve();
  }

  onLayers(): void {}

  onChange(listener: (change: 'contents' | 'size' | 'checkpoints') => void): void {
    this.#listeners.push(listener);
  }

  async close(): Promise<void> {}

  async #run(name: string): Promise<void> {
    this.running = { name, progress: 0.42 };
    await this.hold;
    this.running = undefined;
  }

  #open(contents: FakeContents): OpenContents {
    const id = ++lastId;
    attached.set(id, contents);
    this.opened++;
    return {
      contents,
      shared: { id },
      [Symbol.dispose]: () => {
        if (!attached.delete(id)) throw new Error(`contents ${id} were closed twice`);
        this.opened--;
      },
    };
  }

  #snapshot(checkpoint: Checkpoint): Snapshot {
    const snapshot = this.#snapshots[this.#checkpoints.indexOf(checkpoint)];
    if (snapshot === undefined) throw new Error('the tree holds a checkpoint that is not in the list');
    return snapshot;
  }

  #list(): void {
    const names = shownNames(this.#snapshots.map(({ id, name }) => ({ id, name, nameBytes: Buffer.from(name) })));
    const before = this.#checkpoints;
    this.#checkpoints = this.#snapshots.map(({ id, name, createdMs, state, details, contents }, index) => {
      const same = before.find((old) => old.createdMs === createdMs && old.name === names[index]);
      if (same !== undefined) return same;
      return {
        kind: 'internal',
        name: names[index] as string,
        realName: name,
        id,
        createdMs,
        virtualSize: contents.bytes,
        vmStateSize: [...state.values()].reduce((sum, { bytes }) => sum + bytes, 0),
        vmClockNs: 0,
        layer: `${this.name}.qcow2`,
        consistency: details.consistency,
        stateFiles: Array.from(state, ([file, { bytes }]) => ({ name: file, bytes, allocatedBytes: bytes })),
      };
    });
    this.#changed('checkpoints');
  }

  #changed(change: 'contents' | 'size' | 'checkpoints'): void {
    for (const listener of this.#listeners) listener(change);
  }
}
