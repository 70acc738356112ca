/** A disk: a chain of images under one name, its checkpoints, and the views of its bytes. */
import type { GuestIdentity } from '../guest/guest.ts';
import type { Difference } from '../qcow2/difference.ts';

/**
 * One thread's access to the bytes of a disk at one moment: the live contents or a checkpoint's. Synchronous;
 * READ and WRITE allocate nothing. Offsets and sizes in bytes; ranges must lie inside `size()`.
 * All methods throw FsError.
 */
export interface Contents {
  /** Virtual size in bytes. */
  size(): number;
  read(target: Uint8Array, at: number, length: number, offset: number): void;
  /**
   * @returns false when the gate is closed (a checkpoint is being taken): nothing, or only a part, was written, ask again after `Disk.whenOpen()`.
   * The same holds for discard and writeZeroes.
   */
  write(source: Uint8Array, at: number, length: number, offset: number): boolean;
  /** The range reads as zeros; its clusters are freed where whole ones are covered. */
  discard(offset: number, length: number): boolean;
  /** The range reads as zeros and stays allocated as far as the format has zero clusters. */
  writeZeroes(offset: number, length: number): boolean;
  /** Everything written before is durable when this returns. */
  flush(): void;
  /** What writes have left to do; nobody waits for it. Until then they do it themselves, when there is no other way. */
  tidy?(): void;
  /** First offset ≥ `offset` that holds data, or -1. */
  nextData(offset: number): number;
  /** First offset ≥ `offset` in a hole; `size()` if there is none. */
  nextHole(offset: number): number;
}

/** A `Contents` as plain data that can be posted to another thread, where `attachContents` opens it. */
export interface SharedContents {
  /** Unique in this process. */
  readonly id: number;
  readonly [key: string]: unknown;
}

/** `internal`: in the image; `external`: a file of its own, over which the disk goes on. */
export type CheckpointKind = 'internal' | 'external';

/**
 * `crash`: as if the power had been cut at that moment; `frozen`: the guest's file systems stood still; `memory`: with
 * the guest's memory and devices, of the same instant.
 */
export type Consistency = 'crash' | 'frozen' | 'memory';

/** What a checkpoint remembers besides the disk. */
export interface CheckpointDetails {
  readonly consistency: Consistency;
  /** Whose memory it holds. */
  readonly guest?: GuestIdentity | undefined;
}

/** A file of guest state in a checkpoint: `state` (memory), `state.kern` (devices), `state.meta` (their index). */
export interface StateFileEntry {
  readonly name: string;
  readonly bytes: number;
  /** What it takes without its holes, for st_blocks; about. */
  readonly allocatedBytes: number;
}

/** A checkpoint, as `ls` and info.json list it. */
export interface Checkpoint {
  readonly kind: CheckpointKind;
  /** A valid file name, unique on its disk: the real name, or `name~ID` where that cannot be a file name. */
  readonly name: string;
  readonly realName: string;
  /** The snapshot's ID string in the image; the file's path for an external one. */
  readonly id: string;
  /** Milliseconds since the epoch. */
  readonly createdMs: number;
  /** Bytes of its disk. */
  readonly virtualSize: number;
  /** Bytes of VM state; 0 without memory. */
  readonly vmStateSize: number;
  /** Guest's clock at that moment, nanoseconds since its start. */
  readonly vmClockNs: number;
  /** File name of the image that holds it. */
  readonly layer: string;
  readonly consistency: Consistency;
  /** The guest's state, in the order of the files; none where another program took the snapshot. */
  readonly stateFiles: readonly StateFileEntry[];
}

/** What `info` tells of the image, in the shape of info.json (INTERFACE.md section 3) without guest and checkpoints. */
export interface DiskInfo {
  readonly name: string;
  readonly image: string;
  readonly virtualSize: number;
  readonly allocatedSize: number;
  readonly format: {
    readonly version: number;
    readonly clusterSize: number;
    readonly refcountBits: number;
    readonly features: readonly string[];
  };
  readonly chain: readonly { readonly file: string; readonly format: 'qcow2' | 'raw'; readonly virtualSize: number }[];
}

/** Host bytes of clusters, tables included. */
export interface Space {
  /** Nothing else refers to them. */
  readonly own: number;
  /** Other checkpoints, or the disk as it is now, refer to them, too. */
  readonly shared: number;
}

export interface CheckpointSpace extends Space {
  readonly checkpoint: Checkpoint;
  /** What the host gets back when it is deleted. */
  readonly freed: number;
}

export interface DiskSpace {
  /** In the order of `checkpoints()`. */
  readonly checkpoints: readonly CheckpointSpace[];
  readonly live: Space;
}

/** What runs on the disk right now; `progress` from 0 to 1. */
export interface Operation {
  readonly name: string;
  readonly progress: number;
}

/** A view that someone holds open: it pins what it shows until it is closed. */
export interface OpenContents extends Disposable {
  readonly contents: Contents;
  /** Another object after the layers of the disk have changed, see `Disk.onLayers`. */
  readonly shared: SharedContents;
}

/**
 * A file of guest state on its way into a checkpoint. Writes may come in any order from several threads and go past
 * `size()`, which follows the highest byte written; they never wait for the gate. What was not written reads as zeros.
 */
export interface StateContents extends Contents {
  /** Truncate, or grow by zeros. @throws FsError EFBIG */
  setSize(bytes: number): void;
}

export interface OpenState extends OpenContents {
  readonly contents: StateContents;
}

/**
 * A checkpoint between its instant and its being seen. Other operations of the disk wait until it is published or
 * abandoned; reads and writes go on. If the process dies meanwhile nothing of it stays.
 */
export interface PendingCheckpoint {
  /**
   * A new, empty file of guest state. It can be written from any thread (`attachContents`), and read back; after the
   * pending checkpoint has ended only disposed of. All-zero clusters take no space.
   * @throws FsError EEXIST, EINVAL for a name that no state file has
   */
  createState(name: string): OpenState;
  /**
   * Make it visible, durable. Internal: the state files become one POSIX tar archive in the snapshot's VM-state area;
   * external: they lie beside the overlay, as NAME.qcow2.state and so on. A failure abandons it.
   * @throws FsError ENOSPC, EIO, also when a write to a state file had failed
   */
  publish(details: CheckpointDetails): Promise<Checkpoint>;
  /** No trace stays, its clusters are free again. Does nothing after `publish` or another `abandon`. */
  abandon(): Promise<void>;
}

/** Long work as its caller sees it. */
export interface Work {
  /** Told how far it has come, 0 to 1. */
  readonly progress?: (fraction: number) => void;
  /** Breaks it off; it throws the signal's reason. */
  readonly signal?: AbortSignal;
}

export interface TakeOptions {
  /** `internal` if nothing is said. */
  readonly kind?: CheckpointKind;
  /** `crash` if nothing is said. */
  readonly consistency?: Exclude<Consistency, 'memory'>;
}

export interface DeleteOptions {
  /** External: throw away what was written since, instead of merging. */
  readonly discard?: boolean;
  /** How far a merge has come, 0 to 1. */
  readonly progress?: (fraction: number) => void;
  /** Breaks a merge off; what has been moved stays moved, and nothing is lost. */
  readonly signal?: AbortSignal;
}

export interface CompactOptions {
  /** Nobody has a view of the disk: then the layers below the live one are compacted, too. */
  readonly atRest?: boolean;
  /** Fraction done, 0 to 1. */
  readonly progress?: (fraction: number) => void;
  /** Breaks it off: what has been moved stays moved. */
  readonly signal?: AbortSignal;
}

/** Bytes of the files. */
export interface CompactReport {
  readonly bytesBefore: number;
  readonly bytesAfter: number;
}

export interface Disk {
  /** The image's file name without .qcow2. */
  readonly name: string;
  readonly imagePath: string;
  /** `attached`: the guest's own process has the image open and writes it; here it is only read. */
  readonly owner: 'served' | 'attached';
  /** The image cannot be written: asked for, a read-only file, or found corrupt; the reason in words. */
  readonly readOnly: string | undefined;
  /** How changes are refused then: EBUSY where images of others are built on it, else EROFS. */
  readonly refusal?: 'EBUSY' | undefined;
  /**
   * See what others have changed in an image that is not ours to write, before anyone looks: which checkpoints there
   * are, or the live contents too.
   */
  refresh(what: 'checkpoints' | 'contents'): Promise<void>;
  /** Modification time of the image's bytes in milliseconds. */
  modifiedMs(): number;
  info(): DiskInfo;
  /** Bytes of disk.raw now. */
  virtualSize(): number;
  /** Bytes the live contents (or that checkpoint) occupy, for st_blocks. Cheap: reads no table for a checkpoint. */
  allocatedBytes(checkpoint?: Checkpoint): number;
  /** Current list, in the order of the snapshot table. The same object for the same checkpoint until it changes. */
  checkpoints(): readonly Checkpoint[];

  openLive(): OpenContents;
  openCheckpoint(checkpoint: Checkpoint): OpenContents;
  /** The bytes of the qcow2 file that an external checkpoint made. @throws FsError ENOENT for an internal one */
  openOverlay(checkpoint: Checkpoint): OpenContents;
  /** One of its `stateFiles`. @throws FsError ENOENT if it has none of that name */
  openState(checkpoint: Checkpoint, name: string): OpenContents;
  /** What it remembers. Cheap, but not for listings: may read the image. */
  details(checkpoint: Checkpoint): CheckpointDetails;

  /** `freeze` and `publish` at once. EEXIST, EINVAL, ENOSPC, EROFS, ENOTSUP. Durable when it resolves. */
  takeCheckpoint(name: string, options?: TakeOptions): Promise<Checkpoint>;
  /**
   * Ahead of a `freeze` that must be short, since a guest stands still meanwhile: waits for operations under way, and does
   * what can be done before. Nothing depends on it.
   */
  prepareFreeze(): Promise<void>;
  /**
   * The instant of a checkpoint: what the disk holds is kept, though nobody sees it yet. Writes go on when it resolves;
   * the errors are those of `takeCheckpoint`, and nothing was changed then.
   */
  freeze(kind: CheckpointKind, name: string): Promise<PendingCheckpoint>;
  /** Hold all writes until disposed: for an instant that several disks share. `freeze` works meanwhile. */
  holdWrites(): Promise<AsyncDisposable>;
  /** EBUSY while a file of it is open. */
  deleteCheckpoint(checkpoint: Checkpoint, options?: DeleteOptions): Promise<void>;
  renameCheckpoint(checkpoint: Checkpoint, newName: string): Promise<Checkpoint>;
  rollback(checkpoint: Checkpoint): Promise<void>;
  /** Grow, or shrink with `shrink`; else EPERM. */
  resize(bytes: number, options: { shrink: boolean }): Promise<void>;
  /**
   * Make the live image's file as short as what it holds. Reads and writes go on, and so do other operations of the
   * disk, in between. EROFS, ENOSPC, EINTR.
   */
  compact(options?: CompactOptions): Promise<CompactReport>;

  /**
   * Where the disk at `to` differs from what it was at `from`, by the tables alone, no data is read; undefined: now. A disk
   * that is being written is compared as it is while the tables are read.
   */
  differences(from: Checkpoint | undefined, to: Checkpoint | undefined, work?: Work): Promise<readonly Difference[]>;
  /** By the tables alone, too. */
  space(work?: Work): Promise<DiskSpace>;

  operation(): Operation | undefined;
  /** Resolves when writes are taken again. */
  whenOpen(): Promise<void>;
  /** Called after the live contents, the size or the list of checkpoints changed other than by a write. */
  onChange(listener: (change: 'contents' | 'size' | 'checkpoints') => void): void;
  /**
   * Called after other images came to lie under the open views: `shared` of each is to be attached anew, at once.
   * The listener resolves when no other thread uses what it attached before.
   */
  onLayers(listener: () => Promise<void>): void;
  /** Flush, mark clean, release the locks. */
  close(): Promise<void>;
}
