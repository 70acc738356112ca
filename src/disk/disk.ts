/** A disk: a chain of images under one name, its checkpoints, and the views of its bytes. */

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

/** A checkpoint, as `ls` and info.json list it. */
export interface Checkpoint {
  readonly kind: 'internal' | 'external';
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
  readonly consistency: 'crash' | 'frozen' | 'memory';
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

/** What runs on the disk right now; `progress` from 0 to 1. */
export interface Operation {
  readonly name: string;
  readonly progress: number;
}

/** A view that someone holds open: it pins what it shows until it is closed. */
export interface OpenContents extends Disposable {
  readonly contents: Contents;
  readonly shared: SharedContents;
}

export interface Disk {
  /** The image's file name without .qcow2. */
  readonly name: string;
  readonly imagePath: string;
  /** The image cannot be written: asked for, a read-only file, or found corrupt; the reason in words. */
  readonly readOnly: string | undefined;
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
  /** Bytes of VM state of a checkpoint that has it. */
  openVmState(checkpoint: Checkpoint): OpenContents;

  /** EEXIST, EINVAL, ENOSPC, EROFS, ENOTSUP. Durable when it resolves. */
  takeCheckpoint(name: string): Promise<Checkpoint>;
  /** EBUSY while a file of it is open. */
  deleteCheckpoint(checkpoint: Checkpoint): Promise<void>;
  renameCheckpoint(checkpoint: Checkpoint, newName: string): Promise<Checkpoint>;
  rollback(checkpoint: Checkpoint): Promise<void>;
  /** Grow, or shrink with `shrink`; else EPERM. */
  resize(bytes: number, options: { shrink: boolean }): Promise<void>;

  operation(): Operation | undefined;
  /** Resolves when writes are taken again. */
  whenOpen(): Promise<void>;
  /** Called after the live contents, the size or the list of checkpoints changed other than by a write. */
  onChange(listener: (change: 'contents' | 'size' | 'checkpoints') => void): void;
  /** Flush, mark clean, release the locks. */
  close(): Promise<void>;
}
