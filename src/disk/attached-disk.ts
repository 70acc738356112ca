/**
 * A disk whose guest has the image open itself, and writes it. Here it is only read, without a lock: the guest holds
 * those that matter. The guest is asked to take and to delete checkpoints, and the files tell when it has. Checkpoints are
 * exact, since nobody changes them; the live contents are what the file happens to hold.
 */
import { createHash } from 'node:crypto';
import { statSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { FsError } from '../errors.ts';
import type { AttachedCheckpoints } from '../guest/guest.ts';
import type { Difference } from '../qcow2/difference.ts';
import { HostFile } from '../storage/host-file.ts';
import { isWritten } from '../storage/image-lock.ts';
import type {
  Checkpoint,
  CheckpointDetails,
  CompactReport,
  Contents,
  Disk,
  DiskInfo,
  DiskSpace,
  OpenContents,
  Operation,
  PendingCheckpoint,
  SharedContents,
  TakeOptions,
  Work,
} from './disk.ts';
import { FolderScan, type FoundImage } from './folder-scan.ts';
import { openDisk } from './open-disk.ts';
import { pointNameOf } from './overlay-files.ts';
import { nextViewId, Views } from './views.ts';

export interface AttachedDiskOptions {
  /** The disk's. */
  readonly name: string;
  /** Memory for the caches of each image, in bytes. */
  readonly cacheBytes?: number;
  /** Mountpoints of this process: never looked into. */
  readonly avoid?: readonly string[];
  /** Folders with images that may depend on those of the disk, besides the disk's own. */
  readonly backingRoots?: readonly string[];
  /** How long the image may take to show what the guest was asked for. */
  readonly timeoutMs: number;
  /** Who asks the guest; undefined if nobody knows it. */
  readonly guest: () => AttachedCheckpoints | undefined;
}

/** Between two looks at the image. */
const LOOK_MS = 100;

/** A header has the offset of the snapshot table and of the L1 table: no snapshot comes or goes without a new one. */
const HEADER_BYTES = 4096;

const HELD = "the guest's own process has the image open";

type Change = 'contents' | 'size' | 'checkpoints';

/** The files as they were at one moment. */
interface Opened {
  /** Each with the images below it; the one that the guest writes last. */
  readonly layers: readonly Disk[];
  /** Where each checkpoint is: in the snapshots of a layer, or what a layer held when the next was put over it. */
  readonly checkpoints: ReadonlyMap<Checkpoint, { readonly layer: Disk; readonly own: Checkpoint | undefined }>;
  readonly headers: string;
  readonly stamp: Stamp;
  /** Open views, and one more while it is the present one. */
  uses: number;
}

/** @throws FsError as `openDisk` */
export async function openAttachedDisk(imagePath: string, options: AttachedDiskOptions): Promise<Disk> {
  return new AttachedDisk(imagePath, options, await openAll(imagePath, options));
}

class AttachedDisk implements Disk {
  readonly name: string;
  readonly imagePath: string;
  readonly owner = 'attached';
  readonly readOnly = HELD;
  readonly #options: AttachedDiskOptions;
  readonly #listeners: ((change: Change) => void)[] = [];
  readonly #layerListeners: (() => Promise<void>)[] = [];
  #opened: Opened;
  /** The last of the looks under way, which come one after another; never rejects. */
  #looks: Promise<void> = Promise.resolve();
  #operation: Operation | undefined;
  #closed = false;

  constructor(imagePath: string, options: AttachedDiskOptions, opened: Opened) {
    this.imagePath = imagePath;
    this.name = options.name;
    this.#options = options;
    this.#opened = opened;
  }

  refresh(what: 'checkpoints' | 'contents'): Promise<void> {
    const look = this.#looks.then(() => this.#look(what));
    this.#looks = look.catch(() => {});
    return look;
  }

  modifiedMs(): number {
    return this.#active.modifiedMs();
  }

  info(): DiskInfo {
    return { ...this.#active.info(), name: this.name, image: this.imagePath };
  }

  virtualSize(): number {
    return this.#active.virtualSize();
  }

  allocatedBytes(checkpoint?: Checkpoint): number {
    if (checkpoint === undefined) return this.#active.allocatedBytes();
    const { layer, own } = this.#place(checkpoint);
    return layer.allocatedBytes(own);
  }

  checkpoints(): readonly Checkpoint[] {
    return [...this.#opened.checkpoints.keys()];
  }

  /** Of the files as they are open at each moment. */
  openLive(): OpenContents {
    const id = nextViewId();
    let from: Opened | undefined;
    let shared: SharedContents;
    const follow = (): SharedContents => {
      if (from === this.#opened) return shared;
      from = this.#opened;
      shared = { ...this.#active.openLive().shared, id };
      return shared;
    };
    return {
      contents: new PassingContents(() => this.#active),
      get shared() {
        return follow();
      },
      [Symbol.dispose]: () => {},
    };
  }

  openCheckpoint(checkpoint: Checkpoint): OpenContents {
    const { layer, own } = this.#place(checkpoint);
    return this.#held(own === undefined ? layer.openLive() : layer.openCheckpoint(own));
  }

  openOverlay(checkpoint: Checkpoint): OpenContents {
    if (checkpoint.kind !== 'external') throw new FsError('ENOENT', `checkpoint '${checkpoint.name}' made no file`);
    return new Views().file(checkpoint.id, () => {});
  }

  openState(checkpoint: Checkpoint, name: string): OpenContents {
    const { layer, own } = this.#place(checkpoint);
    if (own === undefined) throw new FsError('ENOENT', `checkpoint '${checkpoint.name}' has no file '${name}'`);
    return this.#held(layer.openState(own, name));
  }

  details(checkpoint: Checkpoint): CheckpointDetails {
    const { layer, own } = this.#place(checkpoint);
    return own === undefined ? { consistency: 'crash' } : layer.details(own);
  }

  /** @throws FsError ETIMEDOUT when the image does not show it in time, ENOTSUP, and what the guest says */
  takeCheckpoint(name: string, { kind = 'internal' }: TakeOptions = {}): Promise<Checkpoint> {
    return this.#running(`${kind === 'internal' ? 'checkpoint' : 'ext-checkpoint'} ${name}`, async () => {
      const taken = () => this.checkpoints().find((one) => one.kind === kind && one.realName === name);
      await this.#guest().take(kind, name);
      await this.#shows(`checkpoint '${name}'`, () => taken() !== undefined);
      return taken() as Checkpoint;
    });
  }

  deleteCheckpoint(checkpoint: Checkpoint): Promise<void> {
    const { kind, name, realName } = checkpoint;
    return this.#running(
      `${kind === 'internal' ? 'del-checkpoint' : 'del-ext-checkpoint'} ${name}`,
      async (progress) => {
        if (kind === 'external') await this.#refuseIfNeeded(checkpoint);
        await this.#guest().delete(kind, realName, progress);
        await this.#shows(`that checkpoint '${name}' is gone`, () => !this.checkpoints().includes(checkpoint));
      },
    );
  }

  async prepareFreeze(): Promise<void> {}
  freeze(): Promise<PendingCheckpoint> {
    return this.#refuse();
  }
  holdWrites(): Promise<AsyncDisposable> {
    return this.#refuse();
  }
  renameCheckpoint(): Promise<Checkpoint> {
    return this.#refuse();
  }
  rollback(): Promise<void> {
    return this.#refuse();
  }
  resize(): Promise<void> {
    return this.#refuse();
  }
  compact(): Promise<CompactReport> {
    return this.#refuse();
  }

  async differences(
    from: Checkpoint | undefined,
    to: Checkpoint | undefined,
    work?: Work,
  ): Promise<readonly Difference[]> {
    return this.#active.differences(this.#ofActive(from), this.#ofActive(to), work);
  }

  space(work?: Work): Promise<DiskSpace> {
    return this.#active.space(work);
  }

  operation(): Operation | undefined {
    return this.#operation;
  }

  async whenOpen(): Promise<void> {}

  onChange(listener: (change: Change) => void): void {
    this.#listeners.push(listener);
  }

  onLayers(listener: () => Promise<void>): void {
    this.#layerListeners.push(listener);
  }

  async close(): Promise<void> {
    await this.#looks;
    if (this.#closed) return;
    this.#closed = true;
    await this.#leave(this.#opened);
  }

  get #active(): Disk {
    return this.#opened.layers.at(-1) as Disk;
  }

  #ofActive(checkpoint: Checkpoint | undefined): Checkpoint | undefined {
    if (checkpoint === undefined) return undefined;
    const { own } = this.#place(checkpoint);
    if (own !== undefined) return own;
    throw new FsError(
      'ENOTSUP',
      `'${checkpoint.name}' is an overlay that the guest has made: it is not compared while it runs`,
    );
  }

  async #running<T>(name: string, work: (progress: (fraction: number) => void) => Promise<T>): Promise<T> {
    const progress = (fraction: number): void => {
      this.#operation = { name, progress: fraction };
    };
    progress(0);
    try {
      return await work(progress);
    } finally {
      this.#operation = undefined;
    }
  }

  #guest(): AttachedCheckpoints {
    const guest = this.#options.guest();
    if (guest !== undefined) return guest;
    throw new FsError(
      'ENOTSUP',
      `${this.imagePath} is open in its guest, which is not known here: mount it with --guest ${this.name}=bhyve:VM or qmp:SOCKET`,
    );
  }

  /** Look at the image until it shows what the guest was asked for. */
  async #shows(what: string, seen: () => boolean): Promise<void> {
    const { timeoutMs } = this.#options;
    for (const deadline = performance.now() + timeoutMs; ; await sleep(LOOK_MS)) {
      await this.refresh('checkpoints');
      if (seen()) return;
      if (performance.now() > deadline) {
        throw new FsError(
          'ETIMEDOUT',
          `the guest was asked, but ${this.imagePath} does not show ${what} within ${timeoutMs / 1000} s; it may still come`,
        );
      }
    }
  }

  /** Merging changes the overlay and what is below it. @throws FsError EBUSY naming the images of others that need them */
  async #refuseIfNeeded(checkpoint: Checkpoint): Promise<void> {
    const paths = this.#opened.layers.map(({ imagePath }) => imagePath);
    const at = paths.indexOf(checkpoint.id);
    const merged = paths.slice(Math.max(0, at - 1), at + 1);
    const { avoid, backingRoots = [] } = this.#options;
    const scan = new FolderScan(avoid);
    const others: string[] = [];
    for (const folder of new Set([...merged.map((path) => dirname(path)), ...backingRoots])) {
      for (const { path, backing } of await scan.folder(folder)) {
        if (backing !== undefined && merged.includes(backing) && !paths.includes(path)) others.push(path);
      }
    }
    if (others.length === 0) return;
    throw new FsError(
      'EBUSY',
      `checkpoint '${checkpoint.name}' cannot be merged away: ${others.join(', ')} ${others.length === 1 ? 'has' : 'have'} its files as backing file`,
    );
  }

  /** What nobody can be asked for. */
  async #refuse(): Promise<never> {
    throw new FsError('EROFS', `${this.imagePath} cannot be changed: ${HELD}`);
  }

  #place(checkpoint: Checkpoint): { readonly layer: Disk; readonly own: Checkpoint | undefined } {
    const found = this.#opened.checkpoints.get(checkpoint);
    if (found === undefined) throw new FsError('ENOENT', `checkpoint '${checkpoint.name}' is there no more`);
    return found;
  }

  /** A view that keeps the files of its moment open. */
  #held(view: OpenContents): OpenContents {
    const opened = this.#opened;
    opened.uses++;
    return {
      contents: view.contents,
      shared: view.shared,
      [Symbol.dispose]: () => {
        view[Symbol.dispose]();
        void this.#leave(opened);
      },
    };
  }

  async #leave(opened: Opened): Promise<void> {
    if (--opened.uses > 0) return;
    for (const layer of opened.layers.toReversed()) await layer.close();
  }

  /** Open the files anew if they are not what they were. */
  async #look(what: 'checkpoints' | 'contents'): Promise<void> {
    const before = this.#opened;
    if (this.#closed) return;
    const stamp = stampOf(before.layers.map(({ imagePath }) => imagePath));
    if (stamp.all === before.stamp.all) return;
    // The guest writes all the time: new headers and new files are what checkpoints come and go by.
    const same = stamp.folder === before.stamp.folder && headersOf(before.layers) === before.headers;
    if (same && what === 'checkpoints') return;
    const opened = await openAll(this.imagePath, this.#options, before);
    if (this.#closed) return this.#leave(opened);
    this.#opened = opened;
    await Promise.all(this.#layerListeners.map((listener) => listener()));
    await this.#leave(before);
    const size = (layers: readonly Disk[]) => layers.at(-1)?.virtualSize();
    if (size(opened.layers) !== size(before.layers)) this.#tell('size');
    if (!same) this.#tell('checkpoints');
    this.#tell('contents');
  }

  #tell(change: Change): void {
    for (const listener of this.#listeners) listener(change);
  }
}

/** The live contents of whatever files are open at the moment of each call. */
class PassingContents implements Contents {
  readonly #active: () => Disk;
  #of: Disk | undefined;
  #contents: Contents | undefined;

  constructor(active: () => Disk) {
    this.#active = active;
  }

  size(): number {
    return this.#now().size();
  }
  read(target: Uint8Array, at: number, length: number, offset: number): void {
    this.#now().read(target, at, length, offset);
  }
  write(): boolean {
    throw new FsError('EROFS', `the disk cannot be written: ${HELD}`);
  }
  discard(): boolean {
    return this.write();
  }
  writeZeroes(): boolean {
    return this.write();
  }
  flush(): void {}
  nextData(offset: number): number {
    return this.#now().nextData(offset);
  }
  nextHole(offset: number): number {
    return this.#now().nextHole(offset);
  }

  #now(): Contents {
    const active = this.#active();
    if (this.#of !== active || this.#contents === undefined) {
      this.#of = active;
      this.#contents = active.openLive().contents;
    }
    return this.#contents;
  }
}

interface Stamp {
  /** Changes with every file that comes or goes beside the one that is written. */
  readonly folder: string;
  /** Changes with every write, too. */
  readonly all: string;
}

function stampOf(paths: readonly string[]): Stamp {
  const folder = stampOfFile(dirname(paths.at(-1) as string));
  return { folder, all: [folder, ...paths.map(stampOfFile)].join(' ') };
}

function stampOfFile(path: string): string {
  const stat = statSync(path, { bigint: true, throwIfNoEntry: false });
  return stat === undefined ? 'gone' : `${stat.ino}:${stat.size}:${stat.mtimeNs}`;
}

function headersOf(layers: readonly Disk[]): string {
  const hash = createHash('sha256');
  for (const { imagePath } of layers) {
    using file = HostFile.open(imagePath, { readOnly: true });
    const header = new Uint8Array(HEADER_BYTES);
    file.read(header, 0, header.length, 0);
    hash.update(imagePath).update(header);
  }
  return hash.digest('hex');
}

/**
 * The image and what the guest has put over it since, bottom first. Others may have built on the image too: the guest's is
 * the end that somebody writes, or where no lock tells that, the one written last.
 */
async function pathsOf(imagePath: string, { avoid = [] }: AttachedDiskOptions): Promise<string[]> {
  const scan = new FolderScan(avoid);
  const image = await scan.image(imagePath);
  if (image === undefined || isHeld(image)) return [imagePath];
  const chains: FoundImage[][] = [[image]];
  for (const chain of chains) {
    const { path } = chain.at(-1) as FoundImage;
    for (const above of await scan.folder(dirname(path))) {
      const next = [...chain, above];
      if (above.backing !== path || chain.includes(above)) continue;
      if (isHeld(above)) return next.map((layer) => layer.path);
      if (above.path.endsWith('.qcow2')) chains.push(next);
    }
  }
  const ends = chains.filter((chain) => !chains.some((other) => other.at(-2) === chain.at(-1)));
  const [last = []] = ends.toSorted((a, b) => modifiedMs(b.at(-1)) - modifiedMs(a.at(-1)));
  return last.map(({ path }) => path);
}

function isHeld({ path }: FoundImage): boolean {
  using file = HostFile.open(path, { readOnly: true });
  return isWritten(file.fd) === true;
}

const modifiedMs = (image: FoundImage | undefined): number =>
  image === undefined ? 0 : (statSync(image.path, { throwIfNoEntry: false })?.mtimeMs ?? 0);

/** @param before whose checkpoints stay the same objects as far as they are the same */
async function openAll(imagePath: string, options: AttachedDiskOptions, before?: Opened): Promise<Opened> {
  const layers: Disk[] = [];
  try {
    const paths = await pathsOf(imagePath, options);
    const stamp = stampOf(paths);
    for (const path of paths) layers.push(await openDisk(path, { ...options, readOnly: true, unlocked: true }));
    const known = new Map(Array.from(before?.checkpoints.keys() ?? [], (one) => [JSON.stringify(one), one]));
    const checkpoints = new Map<Checkpoint, { layer: Disk; own: Checkpoint | undefined }>();
    const names = new Set<string>();
    const add = (found: Checkpoint, layer: Disk, own: Checkpoint | undefined): void => {
      let { name } = found;
      for (let number = 2; names.has(`${found.kind} ${name}`); number++) name = `${found.name}~${number}`;
      names.add(`${found.kind} ${name}`);
      const checkpoint = { ...found, name };
      checkpoints.set(known.get(JSON.stringify(checkpoint)) ?? checkpoint, { layer, own });
    };
    // Snapshots of all images, and the overlays of this program over which the guest was started.
    const top = layers.at(-1) as Disk;
    const listed = top.checkpoints();
    for (const own of listed) add(own, top, own);
    // Those that the guest has made.
    for (const [index, overlay] of layers.entries()) {
      const below = layers[index - 1];
      const name = pointNameOf(options.name, overlay.imagePath);
      if (below === undefined || name === undefined || listed.some(({ id }) => id === overlay.imagePath)) continue;
      add(pointOf(name, overlay, below), below, undefined);
    }
    return { layers, checkpoints, headers: headersOf(layers), stamp, uses: 1 };
  } catch (error) {
    for (const layer of layers.toReversed()) await layer.close();
    throw error;
  }
}

/** What `below` held when `overlay` was put over it. */
const pointOf = (name: string, { imagePath }: Disk, below: Disk): Checkpoint => ({
  kind: 'external',
  name,
  realName: name,
  id: imagePath,
  createdMs: Math.floor(statSync(imagePath).birthtimeMs),
  virtualSize: below.virtualSize(),
  vmStateSize: 0,
  vmClockNs: 0,
  layer: basename(imagePath),
  consistency: 'crash',
  stateFiles: [],
});
