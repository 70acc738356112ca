/** A disk whose image this process serves: the checkpoints, their views, and the order of what is done to them. */
import { statSync } from 'node:fs';
import { setTimeout as rest } from 'node:timers/promises';
import { FsError } from '../errors.ts';
import type { GuestIdentity } from '../guest/guest.ts';
import { compactImage } from '../qcow2/compact/compact.ts';
import { dataClusters } from '../qcow2/data-clusters.ts';
import { type Difference, differences, type Moment } from '../qcow2/difference.ts';
import { closeGate, gateOpen, openGate } from '../qcow2/gate.ts';
import { compatible, type Header, incompatible } from '../qcow2/header.ts';
import { type Image, number } from '../qcow2/image.ts';
import { closeImage } from '../qcow2/open-image.ts';
import { growDisk, shrinkDisk } from '../qcow2/resize.ts';
import { applicationData, type SnapshotEntry } from '../qcow2/snapshot-table.ts';
import {
  applySnapshot,
  deleteSnapshot,
  readSnapshotL1,
  renameSnapshot,
  type SnapshotList,
  vmStateOffset,
} from '../qcow2/snapshots.ts';
import { inSteps, type Steps } from '../qcow2/steps.ts';
import { freezeSnapshot, prepareSnapshot } from '../qcow2/take-snapshot.ts';
import { shownNames, validateNewName } from './checkpoint-name.ts';
import { type CheckpointRecord, decodeGuest, decodeRecord } from './checkpoint-record.ts';
import { compactFrozen } from './compact-layer.ts';
import type {
  Checkpoint,
  CheckpointDetails,
  CheckpointKind,
  CompactOptions,
  CompactReport,
  DeleteOptions,
  Disk,
  DiskInfo,
  DiskSpace,
  OpenContents,
  Operation,
  PendingCheckpoint,
  TakeOptions,
  Work,
} from './disk.ts';
import type { Layer, LayerImage } from './layer.ts';
import type { LayerTree } from './layer-tree.ts';
import { momentOf } from './moments.ts';
import { diskNameOf } from './overlay-files.ts';
import { Overlays } from './overlays.ts';
import type { PendingOverlay } from './pending-overlay.ts';
import { PendingSnapshot } from './pending-snapshot.ts';
import { diskSpace } from './space.ts';
import { detailsText, memoryOffset } from './state-archive.ts';
import { nextViewId, Views } from './views.ts';

/** Disk sizes are whole sectors, as QEMU wants them too. */
const SECTOR_BYTES = 512;

/** Between two turns of compacting when something else came between. */
const REST_MS = 500;

type Change = 'contents' | 'size' | 'checkpoints';

export class OpenedDisk implements Disk {
  readonly name: string;
  readonly imagePath: string;
  readonly owner = 'served';
  readonly readOnly: string | undefined;
  readonly refusal: 'EBUSY' | undefined;
  readonly #tree: LayerTree;
  readonly #views = new Views();
  readonly #live: OpenContents;
  readonly #overlays: Overlays;
  readonly #listeners: ((change: Change) => void)[] = [];
  readonly #layerListeners: (() => Promise<void>)[] = [];
  #snapshots: readonly Checkpoint[] = [];
  readonly #entries = new Map<Checkpoint, SnapshotEntry>();
  /** Which image each snapshot is in. */
  readonly #holders = new Map<SnapshotEntry, Layer>();
  /** Open views of each snapshot. */
  readonly #pins = new Map<SnapshotEntry, number>();
  /** Allocated bytes of checkpoints that were taken in this session; of others only a bound is known. */
  readonly #allocated = new Map<SnapshotEntry, number>();
  #operation: Operation | undefined;
  #pending: PendingSnapshot | PendingOverlay | undefined;
  /** The last of the operations under way, which run one after another; never rejects. */
  #queue: Promise<unknown> = Promise.resolve();
  /** Operations that have been asked for and not begun. */
  #waiting = 0;
  #closed = false;
  /** Long work that can go on another time ends when the disk is closed. */
  readonly #closing = new AbortController();

  constructor(tree: LayerTree) {
    this.imagePath = tree.bottom.path;
    this.name = diskNameOf(this.imagePath);
    this.#tree = tree;
    this.readOnly = tree.options.readOnly ? 'it was opened for reading only' : tree.unwritable;
    this.refusal = tree.builtOn ? 'EBUSY' : undefined;
    this.#live = this.#views.live(() => tree.active);
    this.#overlays = new Overlays({ tree, views: this.#views, relinked: () => this.#relinked() });
    this.#relist();
    this.#image.numbers[number.DATA_CLUSTERS] = dataClusters(this.#image);
  }

  /** The image that is written: another one after an overlay was made or merged. */
  get #image(): Image {
    return this.#tree.active.image;
  }

  /** The snapshots of the image that is written. */
  get #list(): SnapshotList {
    const { qcow2 } = this.#tree.active;
    if (qcow2 === undefined) throw new Error('the live image is qcow2');
    return qcow2.snapshots;
  }

  /** Nobody else writes it. */
  async refresh(): Promise<void> {}

  modifiedMs(): number {
    return statSync(this.#tree.active.path).mtimeMs;
  }

  info(): DiskInfo {
    const { active } = this.#tree;
    const layers = active.chain;
    const { header } = active.qcow2 as LayerImage;
    return {
      name: this.name,
      image: this.imagePath,
      virtualSize: this.virtualSize(),
      allocatedSize: layers[0]!.file.allocatedBytes(),
      format: {
        version: header.version,
        clusterSize: header.clusterBytes,
        refcountBits: header.refcountBits,
        features: features(header),
      },
      chain: layers.map((layer, index) => ({
        file: layer.path,
        format: layer.format,
        virtualSize: index === 0 ? this.virtualSize() : layer.virtualSize,
      })),
    };
  }

  virtualSize(): number {
    return this.#live.contents.size();
  }

  allocatedBytes(checkpoint?: Checkpoint): number {
    if (checkpoint !== undefined) {
      if (checkpoint.kind === 'external') {
        return bound(this.#overlays.allocatedBytes(checkpoint), checkpoint.virtualSize);
      }
      const entry = this.#entryOf(checkpoint);
      return this.#allocated.get(entry) ?? this.#bound(checkpoint.virtualSize);
    }
    const image = this.#image;
    const layers = this.#tree.active.chain;
    const clusters = image.numbers[number.DATA_CLUSTERS] as number;
    if (clusters < 0) return this.#bound(this.virtualSize());
    const below = layers.slice(1).reduce((sum, layer) => sum + layer.hostBytes, 0);
    return Math.min(this.virtualSize(), clusters * image.geometry.clusterBytes + below);
  }

  checkpoints(): readonly Checkpoint[] {
    return [...this.#snapshots, ...this.#overlays.checkpoints];
  }

  openLive(): OpenContents {
    return this.#views.live(() => this.#tree.active);
  }

  openCheckpoint(checkpoint: Checkpoint): OpenContents {
    if (checkpoint.kind === 'external') return this.#overlays.open(checkpoint);
    return this.#openSnapshot(checkpoint, (entry) => ({ base: 0, size: entry.virtualSize }));
  }

  openOverlay(checkpoint: Checkpoint): OpenContents {
    if (checkpoint.kind === 'external') return this.#overlays.openOverlay(checkpoint);
    throw new FsError('ENOENT', `checkpoint '${checkpoint.name}' is inside of an image, it has no overlay`);
  }

  openState(checkpoint: Checkpoint, name: string): OpenContents {
    if (checkpoint.kind === 'external') return this.#overlays.openState(checkpoint, name);
    const file = this.#recordOf(checkpoint).files.find((other) => other.name === name);
    if (file === undefined) throw new FsError('ENOENT', `checkpoint '${checkpoint.name}' has no file '${name}'`);
    return this.#openArchive(checkpoint, file.offset, file.bytes);
  }

  details(checkpoint: Checkpoint): CheckpointDetails {
    if (checkpoint.kind === 'external') return this.#overlays.details(checkpoint);
    const { consistency, guest, guestInArchive } = this.#recordOf(checkpoint);
    return { consistency, guest: guestInArchive ? this.#archivedGuest(checkpoint) : guest };
  }

  #archivedGuest(checkpoint: Checkpoint): GuestIdentity | undefined {
    const bytes = memoryOffset(this.#holderOf(checkpoint).image.geometry.clusterBytes);
    if (checkpoint.vmStateSize < bytes) return undefined;
    using open = this.#openArchive(checkpoint, 0, bytes);
    const front = new Uint8Array(bytes);
    open.contents.read(front, 0, bytes, 0);
    const text = detailsText(front);
    return text === undefined ? undefined : decodeGuest(text);
  }

  #openArchive(checkpoint: Checkpoint, offset: number, bytes: number): OpenContents {
    const { image } = this.#holderOf(checkpoint);
    return this.#openSnapshot(checkpoint, (entry) => ({ base: vmStateOffset(image, entry) + offset, size: bytes }));
  }

  #recordOf(checkpoint: Checkpoint): CheckpointRecord {
    const entry = this.#entryOf(checkpoint);
    return decodeRecord(applicationData(entry), entry.vmStateSize);
  }

  /** The layer that an internal checkpoint is in. */
  #holderOf(checkpoint: Checkpoint): Layer {
    return this.#holders.get(this.#entryOf(checkpoint)) as Layer;
  }

  async takeCheckpoint(name: string, options: TakeOptions = {}): Promise<Checkpoint> {
    const pending = await this.freeze(options.kind ?? 'internal', name);
    return pending.publish({ consistency: options.consistency ?? 'crash' });
  }

  async prepareFreeze(): Promise<void> {
    this.#waiting++;
    try {
      for (let queue: Promise<unknown> | undefined; queue !== this.#queue; ) {
        queue = this.#queue;
        await queue;
      }
    } finally {
      this.#waiting--;
    }
    if (this.readOnly === undefined) await prepareSnapshot(this.#image);
  }

  freeze(kind: CheckpointKind, name: string): Promise<PendingCheckpoint> {
    return new Promise((resolve, reject) => {
      this.#exclusive(`checkpoint ${name}`, async (progress) => {
        this.#checkWritable();
        const pending = await (kind === 'external' ? this.#freezeExternal(name) : this.#freezeInternal(name, progress));
        this.#pending = pending;
        resolve(pending);
        // Other operations wait for its end.
        await pending.ended;
        this.#pending = undefined;
      }).catch(reject);
    });
  }

  async #freezeExternal(name: string): Promise<PendingOverlay> {
    const pending = await this.#overlays.freeze(name, () => {
      this.#relist();
      this.#tell('checkpoints');
    });
    return pending;
  }

  async #freezeInternal(name: string, progress: (fraction: number) => void): Promise<PendingSnapshot> {
    validateNewName(name);
    this.#checkFree(name);
    const image = this.#image;
    const list = this.#list;
    const frozen = await freezeSnapshot(image, list, Date.now(), progress);
    const allocated = (image.numbers[number.DATA_CLUSTERS] as number) < 0 ? undefined : this.allocatedBytes();
    return new PendingSnapshot(frozen, {
      image,
      list,
      name,
      progress,
      share: (area) => ({ id: nextViewId(), kind: 'vm-state', chain: this.#tree.active.shared, area }),
      published: (entry) => {
        if (allocated !== undefined) this.#allocated.set(entry, allocated);
        this.#relist();
        this.#tell('checkpoints');
        return this.#snapshots.find((checkpoint) => this.#entries.get(checkpoint) === entry) as Checkpoint;
      },
    });
  }

  async holdWrites(): Promise<AsyncDisposable> {
    const image = this.#image;
    if (!image.geometry.writable) return { [Symbol.asyncDispose]: async () => {} };
    closeGate(image);
    let held = true;
    return {
      [Symbol.asyncDispose]: async () => {
        // The disk may have gone on in another image meanwhile: that one is held now.
        if (held) openGate(this.#image);
        held = false;
      },
    };
  }

  async deleteCheckpoint(checkpoint: Checkpoint, options: DeleteOptions = {}): Promise<void> {
    if (checkpoint.kind === 'external') return this.#deleteOverlay(checkpoint, options);
    return this.#exclusive(`del-checkpoint ${checkpoint.name}`, async (progress) => {
      await this.#checkChangeable();
      const entry = this.#changeable(checkpoint);
      if ((this.#pins.get(entry) ?? 0) > 0) {
        throw new FsError(
          'EBUSY',
          `a file of checkpoint '${checkpoint.name}' is open; close it, then delete the checkpoint`,
        );
      }
      try {
        await deleteSnapshot(this.#image, this.#list, entry, progress);
      } finally {
        // Once the header is switched the checkpoint is gone, whatever went wrong behind that.
        this.#relist();
        this.#tell('checkpoints');
      }
      this.#allocated.delete(entry);
    });
  }

  async #deleteOverlay(checkpoint: Checkpoint, { discard = false, signal, progress }: DeleteOptions): Promise<void> {
    const closing = this.#closing.signal;
    return this.#exclusive(`del-ext-checkpoint ${checkpoint.name}${discard ? ' --discard' : ''}`, async (shown) => {
      this.#checkWritable();
      const sizeBefore = this.virtualSize();
      try {
        if (discard) await this.#overlays.discard(checkpoint);
        else {
          const signals = signal === undefined ? closing : AbortSignal.any([signal, closing]);
          await this.#overlays.delete(checkpoint, {
            progress: (fraction) => {
              shown(fraction);
              progress?.(fraction);
            },
            signal: signals,
          });
        }
      } finally {
        this.#layersChanged();
        if (discard) this.#contentsChanged(sizeBefore);
      }
    });
  }

  async renameCheckpoint(checkpoint: Checkpoint, newName: string): Promise<Checkpoint> {
    return this.#exclusive(`rename ${checkpoint.name}`, async () => {
      this.#checkWritable();
      if (checkpoint.kind === 'external') {
        try {
          return await this.#overlays.rename(checkpoint, newName);
        } finally {
          this.#layersChanged();
        }
      }
      const entry = this.#changeable(checkpoint);
      validateNewName(newName);
      if (newName === checkpoint.name && newName === checkpoint.realName) return checkpoint;
      this.#checkFree(newName, checkpoint);
      const renamed = await renameSnapshot(this.#image, this.#list, entry, newName);
      const pins = this.#pins.get(entry);
      this.#pins.delete(entry);
      if (pins !== undefined) this.#pins.set(renamed, pins);
      this.#relist();
      this.#tell('checkpoints');
      return this.#snapshots.find((other) => this.#entries.get(other) === renamed) as Checkpoint;
    });
  }

  async rollback(checkpoint: Checkpoint): Promise<void> {
    return this.#exclusive(`rollback ${checkpoint.name}`, async (progress) => {
      const sizeBefore = this.virtualSize();
      if (checkpoint.kind === 'external') {
        this.#checkWritable();
        try {
          await this.#overlays.rollback(checkpoint);
        } finally {
          this.#layersChanged();
        }
      } else {
        await this.#checkChangeable();
        await applySnapshot(this.#image, this.#changeable(checkpoint), progress);
      }
      this.#contentsChanged(sizeBefore);
    });
  }

  #contentsChanged(sizeBefore: number): void {
    this.#tell('contents');
    if (this.virtualSize() !== sizeBefore) this.#tell('size');
  }

  /** There are other layers, and so other checkpoints. */
  #layersChanged(): void {
    this.#overlays.relist();
    this.#relist();
    this.#tell('checkpoints');
  }

  async resize(bytes: number, options: { shrink: boolean }): Promise<void> {
    return this.#exclusive('resize', async () => {
      await this.#checkChangeable();
      const size = this.virtualSize();
      if (bytes === size) return;
      if (!Number.isSafeInteger(bytes) || bytes < 0 || bytes % SECTOR_BYTES !== 0) {
        throw new FsError('EINVAL', `${bytes} bytes are no size for a disk; it must be a multiple of ${SECTOR_BYTES}`);
      }
      if (bytes > size) {
        await growDisk(this.#image, bytes);
      } else if (options.shrink) {
        await shrinkDisk(this.#image, bytes);
      } else {
        throw new FsError(
          'EPERM',
          `the disk has ${size} bytes, and shrinking it to ${bytes} throws its end away; use vdskfs resize --shrink if that is meant`,
        );
      }
      this.#tell('size');
    });
  }

  async compact({ atRest = false, progress, signal }: CompactOptions = {}): Promise<CompactReport> {
    this.#checkWritable();
    const active = this.#tree.active;
    const frozen = atRest ? [...this.#tree.layers].filter((layer) => layer !== active) : [];
    const layers = [active, ...frozen];
    const bytes = (): number => layers.reduce((sum, { file }) => sum + file.size(), 0);
    const bytesBefore = bytes();
    for (const [index, layer] of layers.entries()) {
      await this.#compactLayer(layer, signal, (fraction) => progress?.((index + fraction) / layers.length));
    }
    return { bytesBefore, bytesAfter: bytes() };
  }

  async #compactLayer(layer: Layer, signal: AbortSignal | undefined, progress: (f: number) => void): Promise<void> {
    const tree = this.#tree;
    const frozen = layer !== tree.active;
    const bytesBefore = layer.file.size();
    for (;;) {
      const { finished } = await this.#exclusive('compact', async (shown) => {
        const options = {
          progress: (fraction: number) => {
            shown(fraction);
            progress(fraction);
          },
          // Whoever waits comes first: then it goes on.
          stop: () => signal?.aborted === true || this.#waiting > 0,
        };
        if (!frozen && layer === tree.active) return compactImage(layer.image, this.#list, options);
        if (!frozen)
          throw new FsError('EBUSY', `${this.name} has gone on in another image meanwhile; compact it again`);
        try {
          return await compactFrozen(layer, tree.options.cacheBytes, options);
        } finally {
          for (const above of tree.above(layer)) above.follow(layer);
          this.#views.follow();
        }
      });
      if (finished) return;
      if (signal?.aborted) {
        const given = bytesBefore - layer.file.size();
        throw new FsError(
          'EINTR',
          `${layer.path}: compacting was broken off; the image is whole and ${given} bytes shorter, and compacting it again goes on from there`,
        );
      }
      // What came between is often followed by more: a freeze by what was prepared for it.
      await rest(REST_MS, undefined, signal === undefined ? {} : { signal }).catch(() => {});
    }
  }

  differences(
    from: Checkpoint | undefined,
    to: Checkpoint | undefined,
    work: Work = {},
  ): Promise<readonly Difference[]> {
    return this.#measure('diff', () => differences(this.#momentOf(from), this.#momentOf(to)), work);
  }

  space(work: Work = {}): Promise<DiskSpace> {
    const find = (checkpoint: Checkpoint) => {
      if (checkpoint.kind === 'external') return { overlay: this.#overlays.overlayOf(checkpoint) };
      const entry = this.#entryOf(checkpoint);
      return { entry, layer: this.#holders.get(entry) as Layer };
    };
    const { active, layers } = this.#tree;
    return this.#measure('space', () => diskSpace({ active, layers, checkpoints: this.checkpoints(), find }), work);
  }

  /** Read tables, while other operations wait, and writes do not. */
  #measure<T>(name: string, steps: () => Steps<T>, { progress, signal }: Work): Promise<T> {
    return this.#exclusive(name, (showProgress) =>
      inSteps(steps(), {
        progress: (fraction) => {
          showProgress(fraction);
          progress?.(fraction);
        },
        ...(signal === undefined ? {} : { signal }),
      }),
    );
  }

  #momentOf(checkpoint: Checkpoint | undefined): Moment {
    if (checkpoint === undefined) return momentOf(this.#tree.active);
    if (checkpoint.kind === 'external') return momentOf(this.#overlays.overlayOf(checkpoint).below as Layer);
    const entry = this.#entryOf(checkpoint);
    return momentOf(this.#holders.get(entry) as Layer, entry);
  }

  operation(): Operation | undefined {
    return this.#operation;
  }

  async whenOpen(): Promise<void> {
    for (let image = this.#image; ; image = this.#image) {
      await gateOpen(image);
      if (image === this.#image) return;
    }
  }

  onChange(listener: (change: Change) => void): void {
    this.#listeners.push(listener);
  }

  onLayers(listener: () => Promise<void>): void {
    this.#layerListeners.push(listener);
  }

  async close(): Promise<void> {
    this.#closing.abort(new FsError('EINTR', `${this.imagePath} is being closed`));
    await this.#pending?.abandon();
    await this.#queue;
    if (this.#closed) return;
    this.#closed = true;
    try {
      closeImage(this.#image);
    } finally {
      this.#tree[Symbol.dispose]();
    }
  }

  /** Run one operation after those before it. */
  #exclusive<T>(name: string, action: (progress: (fraction: number) => void) => Promise<T>): Promise<T> {
    this.#waiting++;
    const run = this.#queue.then(async () => {
      this.#waiting--;
      if (this.#closed) throw new FsError('EBUSY', `${this.imagePath} is being closed`);
      this.#operation = { name, progress: 0 };
      try {
        return await action((progress) => {
          this.#operation = { name, progress };
        });
      } finally {
        this.#operation = undefined;
      }
    });
    this.#queue = run.catch(() => {});
    return run;
  }

  /** For changes of what the image holds. @throws FsError EROFS; EBUSY naming images of others that are built on it */
  async #checkChangeable(): Promise<void> {
    this.#checkWritable();
    await this.#overlays.refuseDependents([this.#tree.active]);
  }

  #checkWritable(): void {
    if (this.readOnly !== undefined)
      throw new FsError(this.refusal ?? 'EROFS', `${this.imagePath} cannot be changed: ${this.readOnly}`);
  }

  #checkFree(name: string, except?: Checkpoint): void {
    const taken = this.#snapshots.some((other) => other !== except && (other.name === name || other.realName === name));
    if (taken) throw new FsError('EEXIST', `'${this.name}' has a checkpoint '${name}' already; choose another name`);
  }

  #entryOf(checkpoint: Checkpoint): SnapshotEntry {
    const entry = this.#entries.get(checkpoint);
    if (entry === undefined) throw new FsError('ENOENT', `checkpoint '${checkpoint.name}' is there no more`);
    return entry;
  }

  /** For changes. @throws FsError ENOTSUP for a snapshot in a layer that is not written any more */
  #changeable(checkpoint: Checkpoint): SnapshotEntry {
    const entry = this.#entryOf(checkpoint);
    if (this.#holders.get(entry) === this.#tree.active) return entry;
    throw new FsError(
      'ENOTSUP',
      `checkpoint '${checkpoint.name}' is kept in ${checkpoint.layer}, which is frozen under overlays: it can be read, but not changed or rolled back to before the overlays above are merged`,
    );
  }

  /** Make the lists of checkpoints follow the images, with the same objects for what did not change. */
  #relist(): void {
    const held = this.#tree.active.chain
      .toReversed()
      .flatMap((layer) => (layer.qcow2?.snapshots.entries ?? []).map((entry) => ({ layer, entry })));
    const names = shownNames(held.map(({ entry }) => ({ id: entry.id, name: entry.name, nameBytes: entry.nameRaw })));
    const known = new Map([...this.#entries].map(([checkpoint, entry]) => [entry, checkpoint]));
    this.#entries.clear();
    this.#holders.clear();
    this.#snapshots = held.map(({ layer, entry }, index) => {
      const name = names[index] as string;
      const old = known.get(entry);
      const same = old?.name === name && old.layer === layer.name;
      const checkpoint = same ? old : checkpointOf(entry, name, layer.name);
      this.#entries.set(checkpoint, entry);
      this.#holders.set(entry, layer);
      return checkpoint;
    });
  }

  #bound(size: number): number {
    return bound(
      this.#tree.active.chain.reduce((sum, layer) => sum + layer.hostBytes, 0),
      size,
    );
  }

  #openSnapshot(checkpoint: Checkpoint, part: (entry: SnapshotEntry) => { base: number; size: number }): OpenContents {
    const entry = this.#entryOf(checkpoint);
    const layer = this.#holderOf(checkpoint);
    const l1 = readSnapshotL1(layer.image, entry);
    const pins = this.#pins;
    pins.set(entry, (pins.get(entry) ?? 0) + 1);
    return this.#views.snapshot(layer, { l1, ...part(entry) }, () => {
      // The entry may have been replaced by a renamed one meanwhile.
      const now = pins.has(entry)
        ? entry
        : [...pins.keys()].find((other) => other.l1TableOffset === entry.l1TableOffset);
      if (now !== undefined) pins.set(now, (pins.get(now) ?? 1) - 1);
    });
  }

  async #relinked(): Promise<void> {
    this.#views.follow();
    await Promise.all(this.#layerListeners.map((listener) => listener()));
  }

  #tell(change: Change): void {
    for (const listener of this.#listeners) listener(change);
  }
}

/**
 * What a mapping that was not counted occupies at most: what the files do. One sector less than the whole, so that
 * programs that compare it with the size ask for the holes.
 */
const bound = (fileBytes: number, size: number): number => Math.max(0, Math.min(fileBytes, size - SECTOR_BYTES));

function checkpointOf(entry: SnapshotEntry, name: string, layer: string): Checkpoint {
  const record = decodeRecord(applicationData(entry), entry.vmStateSize);
  return {
    kind: 'internal',
    name,
    realName: entry.name,
    id: entry.id,
    createdMs: entry.seconds * 1000 + Math.floor(entry.nanoseconds / 1_000_000),
    virtualSize: entry.virtualSize,
    vmStateSize: entry.vmStateSize,
    vmClockNs: Number(entry.vmClockNs),
    layer,
    consistency: record.consistency,
    stateFiles: record.files.map(({ name: file, bytes, allocatedBytes }) => ({ name: file, bytes, allocatedBytes })),
  };
}

/** Names of what is unusual about the image, as info.json shows them. */
function features(header: Header): string[] {
  const names: [boolean, string][] = [
    [(header.compatible & compatible.LAZY_REFCOUNTS) !== 0n, 'lazy-refcounts'],
    [(header.incompatible & incompatible.EXTENDED_L2) !== 0n, 'extended-l2'],
    [header.externalDataFile, header.dataFileRaw ? 'data-file-raw' : 'data-file'],
    [header.compressionType === 'zstd', 'zstd'],
    [header.bitmaps !== undefined, 'bitmaps'],
    [header.corrupt, 'corrupt'],
  ];
  return names.filter(([present]) => present).map(([, name]) => name);
}
