/** A disk whose image this process serves: the checkpoints, their views, and the order of what is done to them. */
import { statSync } from 'node:fs';
import { basename } from 'node:path';
import { FsError } from '../errors.ts';
import type { GuestIdentity } from '../guest/guest.ts';
import { compactImage } from '../qcow2/compact/compact.ts';
import { dataClusters } from '../qcow2/data-clusters.ts';
import { closeGate, gateOpen, openGate } from '../qcow2/gate.ts';
import { compatible, incompatible } from '../qcow2/header.ts';
import { number } from '../qcow2/image.ts';
import { closeImage, snapshotList } from '../qcow2/open-image.ts';
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
import { freezeSnapshot } from '../qcow2/take-snapshot.ts';
import type { SharedStateArea } from '../qcow2/vm-state.ts';
import type { SharedView } from './attach-contents.ts';
import { shownNames, validateNewName } from './checkpoint-name.ts';
import { type CheckpointRecord, decodeGuest, decodeRecord } from './checkpoint-record.ts';
import { LiveContents, SnapshotContents } from './contents.ts';
import type {
  Checkpoint,
  CheckpointDetails,
  CheckpointKind,
  CompactOptions,
  CompactReport,
  DeleteOptions,
  Disk,
  DiskInfo,
  OpenContents,
  Operation,
  PendingCheckpoint,
  TakeOptions,
} from './disk.ts';
import type { OpenChain } from './open-chain.ts';
import { PendingSnapshot } from './pending-snapshot.ts';
import { detailsText, memoryOffset } from './state-archive.ts';

/** Disk sizes are whole sectors, as QEMU wants them too. */
const SECTOR_BYTES = 512;

type Change = 'contents' | 'size' | 'checkpoints';

let lastId = 0;
const nextId = (): number => ++lastId;

export class OpenedDisk implements Disk {
  readonly name: string;
  readonly imagePath: string;
  readonly readOnly: string | undefined;
  readonly #chain: OpenChain;
  readonly #chainId = nextId();
  readonly #list: SnapshotList;
  readonly #live: LiveContents;
  readonly #listeners: ((change: Change) => void)[] = [];
  #checkpoints: readonly Checkpoint[] = [];
  readonly #entries = new Map<Checkpoint, SnapshotEntry>();
  /** Open views of each snapshot. */
  readonly #pins = new Map<SnapshotEntry, number>();
  /** Allocated bytes of checkpoints that were taken in this session; of others only a bound is known. */
  readonly #allocated = new Map<string, number>();
  #operation: Operation | undefined;
  #pending: PendingSnapshot | undefined;
  /** The last of the operations under way, which run one after another; never rejects. */
  #queue: Promise<unknown> = Promise.resolve();
  /** Operations that have been asked for and not begun. */
  #waiting = 0;
  #closed = false;

  constructor(imagePath: string, chain: OpenChain, readOnlyAsked: boolean) {
    this.imagePath = imagePath;
    this.name = basename(imagePath).replace(/\.qcow2$/, '');
    this.#chain = chain;
    this.readOnly = readOnlyAsked ? 'it was opened for reading only' : chain.unwritable;
    this.#list = snapshotList(chain.header, chain.snapshots);
    this.#live = new LiveContents(chain.image);
    this.#relist();
    chain.image.numbers[number.DATA_CLUSTERS] = dataClusters(chain.image);
  }

  modifiedMs(): number {
    return statSync(this.imagePath).mtimeMs;
  }

  info(): DiskInfo {
    const { header, layers } = this.#chain;
    return {
      name: this.name,
      image: this.imagePath,
      virtualSize: this.virtualSize(),
      allocatedSize: layers[0]!.file.allocatedBytes(),
      format: {
        version: header.version,
        clusterSize: header.clusterBytes,
        refcountBits: header.refcountBits,
        features: features(this.#chain),
      },
      chain: layers.map((layer, index) => ({
        file: layer.path,
        format: layer.format,
        virtualSize: index === 0 ? this.virtualSize() : layer.virtualSize,
      })),
    };
  }

  virtualSize(): number {
    return this.#live.size();
  }

  allocatedBytes(checkpoint?: Checkpoint): number {
    if (checkpoint !== undefined) {
      const known = this.#allocated.get(checkpoint.id);
      return known ?? this.#bound(checkpoint.virtualSize);
    }
    const { image, layers } = this.#chain;
    const clusters = image.numbers[number.DATA_CLUSTERS] as number;
    if (clusters < 0) return this.#bound(this.virtualSize());
    const below = layers.slice(1).reduce((sum, layer) => sum + layer.file.allocatedBytes(), 0);
    return Math.min(this.virtualSize(), clusters * image.geometry.clusterBytes + below);
  }

  checkpoints(): readonly Checkpoint[] {
    return this.#checkpoints;
  }

  openLive(): OpenContents {
    return { contents: this.#live, shared: this.#share(undefined), [Symbol.dispose]: () => {} };
  }

  openCheckpoint(checkpoint: Checkpoint): OpenContents {
    return this.#openSnapshot(checkpoint, (entry) => ({ base: 0, size: entry.virtualSize }));
  }

  openState(checkpoint: Checkpoint, name: string): OpenContents {
    const file = this.#recordOf(checkpoint).files.find((other) => other.name === name);
    if (file === undefined) throw new FsError('ENOENT', `checkpoint '${checkpoint.name}' has no file '${name}'`);
    return this.#openArchive(checkpoint, file.offset, file.bytes);
  }

  details(checkpoint: Checkpoint): CheckpointDetails {
    const { consistency, guest, guestInArchive } = this.#recordOf(checkpoint);
    return { consistency, guest: guestInArchive ? this.#archivedGuest(checkpoint) : guest };
  }

  #archivedGuest(checkpoint: Checkpoint): GuestIdentity | undefined {
    const bytes = memoryOffset(this.#chain.header.clusterBytes);
    if (checkpoint.vmStateSize < bytes) return undefined;
    using open = this.#openArchive(checkpoint, 0, bytes);
    const front = new Uint8Array(bytes);
    open.contents.read(front, 0, bytes, 0);
    const text = detailsText(front);
    return text === undefined ? undefined : decodeGuest(text);
  }

  #openArchive(checkpoint: Checkpoint, offset: number, bytes: number): OpenContents {
    return this.#openSnapshot(checkpoint, (entry) => ({
      base: vmStateOffset(this.#chain.image, entry) + offset,
      size: bytes,
    }));
  }

  #recordOf(checkpoint: Checkpoint): CheckpointRecord {
    const entry = this.#entryOf(checkpoint);
    return decodeRecord(applicationData(entry), entry.vmStateSize);
  }

  async takeCheckpoint(name: string, options: TakeOptions = {}): Promise<Checkpoint> {
    const pending = await this.freeze(options.kind ?? 'internal', name);
    return pending.publish({ consistency: options.consistency ?? 'crash' });
  }

  freeze(kind: CheckpointKind, name: string): Promise<PendingCheckpoint> {
    return new Promise((resolve, reject) => {
      this.#exclusive(`checkpoint ${name}`, async (progress) => {
        this.#checkWritable();
        validateNewName(name);
        this.#checkFree(name);
        if (kind === 'external') {
          throw new FsError(
            'ENOTSUP',
            `${this.imagePath}: overlays are not supported yet; take an internal checkpoint`,
          );
        }
        const pending = await this.#freezeInternal(name, progress);
        this.#pending = pending;
        resolve(pending);
        // Other operations wait for its end.
        await pending.ended;
        this.#pending = undefined;
      }).catch(reject);
    });
  }

  async #freezeInternal(name: string, progress: (fraction: number) => void): Promise<PendingSnapshot> {
    const { image } = this.#chain;
    const frozen = await freezeSnapshot(image, this.#list, Date.now(), progress);
    const allocated = (image.numbers[number.DATA_CLUSTERS] as number) < 0 ? undefined : this.allocatedBytes();
    return new PendingSnapshot(frozen, {
      image,
      list: this.#list,
      name,
      progress,
      share: (area) => this.#share(undefined, area),
      published: (entry) => {
        if (allocated !== undefined) this.#allocated.set(entry.id, allocated);
        this.#relist();
        this.#tell('checkpoints');
        return this.#checkpoints.find((checkpoint) => this.#entries.get(checkpoint) === entry) as Checkpoint;
      },
    });
  }

  async holdWrites(): Promise<AsyncDisposable> {
    const { image } = this.#chain;
    if (!image.geometry.writable) return { [Symbol.asyncDispose]: async () => {} };
    closeGate(image);
    let held = true;
    return {
      [Symbol.asyncDispose]: async () => {
        if (held) openGate(image);
        held = false;
      },
    };
  }

  async deleteCheckpoint(checkpoint: Checkpoint, _options: DeleteOptions = {}): Promise<void> {
    return this.#exclusive(`del-checkpoint ${checkpoint.name}`, async (progress) => {
      this.#checkWritable();
      const entry = this.#entryOf(checkpoint);
      if ((this.#pins.get(entry) ?? 0) > 0) {
        throw new FsError(
          'EBUSY',
          `a file of checkpoint '${checkpoint.name}' is open; close it, then delete the checkpoint`,
        );
      }
      try {
        await deleteSnapshot(this.#chain.image, this.#list, entry, progress);
      } finally {
        // Once the header is switched the checkpoint is gone, whatever went wrong behind that.
        this.#relist();
        this.#tell('checkpoints');
      }
      this.#allocated.delete(entry.id);
    });
  }

  async renameCheckpoint(checkpoint: Checkpoint, newName: string): Promise<Checkpoint> {
    return this.#exclusive(`rename ${checkpoint.name}`, async () => {
      this.#checkWritable();
      const entry = this.#entryOf(checkpoint);
      validateNewName(newName);
      if (newName === checkpoint.name && newName === checkpoint.realName) return checkpoint;
      this.#checkFree(newName, checkpoint);
      const renamed = await renameSnapshot(this.#chain.image, this.#list, entry, newName);
      const pins = this.#pins.get(entry);
      this.#pins.delete(entry);
      if (pins !== undefined) this.#pins.set(renamed, pins);
      this.#relist();
      this.#tell('checkpoints');
      return this.#checkpoints.find((other) => this.#entries.get(other) === renamed) as Checkpoint;
    });
  }

  async rollback(checkpoint: Checkpoint): Promise<void> {
    return this.#exclusive(`rollback ${checkpoint.name}`, async (progress) => {
      this.#checkWritable();
      const sizeBefore = this.virtualSize();
      await applySnapshot(this.#chain.image, this.#entryOf(checkpoint), progress);
      this.#tell('contents');
      if (this.virtualSize() !== sizeBefore) this.#tell('size');
    });
  }

  async resize(bytes: number, options: { shrink: boolean }): Promise<void> {
    return this.#exclusive('resize', async () => {
      this.#checkWritable();
      const size = this.virtualSize();
      if (bytes === size) return;
      if (!Number.isSafeInteger(bytes) || bytes < 0 || bytes % SECTOR_BYTES !== 0) {
        throw new FsError('EINVAL', `${bytes} bytes are no size for a disk; it must be a multiple of ${SECTOR_BYTES}`);
      }
      if (bytes > size) {
        await growDisk(this.#chain.image, bytes);
      } else if (options.shrink) {
        await shrinkDisk(this.#chain.image, bytes);
      } else {
        throw new FsError(
          'EPERM',
          `the disk has ${size} bytes, and shrinking it to ${bytes} throws its end away; use vdskfs resize --shrink if that is meant`,
        );
      }
      this.#tell('size');
    });
  }

  async compact({ progress, signal }: CompactOptions = {}): Promise<CompactReport> {
    this.#checkWritable();
    const { image } = this.#chain;
    const bytesBefore = image.file.size();
    for (;;) {
      const { finished } = await this.#exclusive('compact', (shown) => {
        return compactImage(image, this.#list, {
          progress: (fraction) => {
            shown(fraction);
            progress?.(fraction);
          },
          // Whoever waits comes first: then it goes on.
          stop: () => signal?.aborted === true || this.#waiting > 0,
        });
      });
      if (finished) return { bytesBefore, bytesAfter: image.file.size() };
      if (signal?.aborted) {
        throw new FsError(
          'EINTR',
          `${this.imagePath}: compacting was broken off; the image is whole and ${bytesBefore - image.file.size()} bytes shorter, and compacting it again goes on from there`,
        );
      }
    }
  }

  operation(): Operation | undefined {
    return this.#operation;
  }

  async whenOpen(): Promise<void> {
    await gateOpen(this.#chain.image);
  }

  onChange(listener: (change: Change) => void): void {
    this.#listeners.push(listener);
  }

  async close(): Promise<void> {
    await this.#pending?.abandon();
    await this.#queue;
    if (this.#closed) return;
    this.#closed = true;
    try {
      closeImage(this.#chain.image);
    } finally {
      this.#chain[Symbol.dispose]();
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

  #checkWritable(): void {
    if (this.readOnly !== undefined)
      throw new FsError('EROFS', `${this.imagePath} cannot be changed: ${this.readOnly}`);
  }

  #checkFree(name: string, except?: Checkpoint): void {
    const taken = this.#checkpoints.some(
      (other) => other !== except && (other.name === name || other.realName === name),
    );
    if (taken) throw new FsError('EEXIST', `'${this.name}' has a checkpoint '${name}' already; choose another name`);
  }

  #entryOf(checkpoint: Checkpoint): SnapshotEntry {
    const entry = this.#entries.get(checkpoint);
    if (entry === undefined) throw new FsError('ENOENT', `checkpoint '${checkpoint.name}' is there no more`);
    return entry;
  }

  /** Make the list of checkpoints follow the snapshot table, with the same objects for what did not change. */
  #relist(): void {
    const entries = this.#list.entries;
    const names = shownNames(entries.map((entry) => ({ id: entry.id, name: entry.name, nameBytes: entry.nameRaw })));
    const known = new Map([...this.#entries].map(([checkpoint, entry]) => [entry, checkpoint]));
    this.#entries.clear();
    this.#checkpoints = entries.map((entry, index) => {
      const name = names[index] as string;
      const old = known.get(entry);
      const checkpoint = old?.name === name ? old : checkpointOf(entry, name, basename(this.imagePath));
      this.#entries.set(checkpoint, entry);
      return checkpoint;
    });
  }

  /**
   * What a mapping that was not counted occupies at most: what the files do. One sector less than the whole, so that
   * programs that compare it with the size ask for the holes.
   */
  #bound(size: number): number {
    const files = this.#chain.layers.reduce((sum, layer) => sum + layer.file.allocatedBytes(), 0);
    return Math.max(0, Math.min(files, size - SECTOR_BYTES));
  }

  #openSnapshot(checkpoint: Checkpoint, part: (entry: SnapshotEntry) => { base: number; size: number }): OpenContents {
    const entry = this.#entryOf(checkpoint);
    const { image } = this.#chain;
    const l1 = readSnapshotL1(image, entry);
    const { base, size } = part(entry);
    const pins = this.#pins;
    pins.set(entry, (pins.get(entry) ?? 0) + 1);
    let open = true;
    return {
      contents: new SnapshotContents(image, l1, base, size),
      shared: this.#share({
        l1: l1.view.buffer as SharedArrayBuffer,
        l1Entries: l1.entries,
        diskBytes: entry.virtualSize,
        base,
        size,
      }),
      [Symbol.dispose]: () => {
        if (!open) return;
        open = false;
        // The entry may have been replaced by a renamed one meanwhile.
        const now = pins.has(entry)
          ? entry
          : [...pins.keys()].find((other) => other.l1TableOffset === entry.l1TableOffset);
        if (now !== undefined) pins.set(now, (pins.get(now) ?? 1) - 1);
      },
    };
  }

  #share(snapshot: SharedView['snapshot'], state?: SharedStateArea): SharedView {
    const view = { id: nextId(), chainId: this.#chainId, chain: this.#chain.shared, snapshot };
    return state === undefined ? view : { ...view, state };
  }

  #tell(change: Change): void {
    for (const listener of this.#listeners) listener(change);
  }
}

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
    stateFiles: record.files.map(({ name: file, bytes }) => ({ name: file, bytes })),
  };
}

/** Names of what is unusual about the image, as info.json shows them. */
function features({ header }: OpenChain): string[] {
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
