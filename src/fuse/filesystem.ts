/**
 * The tree as a driver sees it. Both drivers (native and fuse-native) serve this interface; the tree implements it and
 * knows neither. Failures are thrown as `FsError`; anything else thrown is our bug: logged, answered EIO.
 */

import type { TransferListItem } from 'node:worker_threads';

/** Who asks. `signal` aborts when the kernel interrupts the request (the caller got a signal). */
export interface Caller {
  readonly uid: number;
  readonly gid: number;
  readonly pid: number;
  readonly signal: AbortSignal;
}

/** stat(2) of a node. Times in milliseconds since the epoch. */
export interface Attributes {
  /** Type and permission bits, as in st_mode. */
  readonly mode: number;
  readonly nlink: number;
  readonly uid: number;
  readonly gid: number;
  /** Bytes. */
  readonly size: number;
  /** Allocated bytes; st_blocks is this in units of 512, rounded up. */
  readonly allocatedBytes: number;
  readonly atimeMs: number;
  readonly mtimeMs: number;
  readonly ctimeMs: number;
}

/** What setattr asks for; only what is present changes. */
export interface AttributeChange {
  readonly size?: number;
  readonly mode?: number;
  readonly uid?: number;
  readonly gid?: number;
  readonly times?: boolean;
}

interface NodeBase {
  /** Inode number and nodeid in one: unique while the file system is mounted, never used twice. The root's is 1. */
  readonly ino: number;
  /** How long the kernel may trust this node's attributes, in milliseconds; 0: ask each time. */
  readonly attributesValidMs: number;
  /** How long the kernel may trust that this node's name leads to it, in milliseconds. */
  readonly entryValidMs: number;
  attributes(): Promise<Attributes>;
  /** @throws FsError EPERM, EROFS … where the node does not change that way */
  setAttributes(change: AttributeChange, caller: Caller): Promise<void>;
}

export interface DirectoryEntry {
  readonly name: string;
  readonly node: Node;
}

export interface DirectoryNode extends NodeBase {
  readonly kind: 'directory';
  /** For `..` in listings; the root is its own parent. */
  readonly parentIno: number;
  /** The same node object for the same thing each time. @throws FsError ENOENT */
  lookup(name: string): Promise<Node>;
  /** All entries, without `.` and `..`. Hidden names (`.incoming`, `.by-id`) can be looked up but are not listed. */
  list(): Promise<readonly DirectoryEntry[]>;
  makeDirectory(name: string, caller: Caller): Promise<Node>;
  removeDirectory(name: string, caller: Caller): Promise<void>;
  /**
   * Regular files come into being only where the tree receives guest state; EPERM elsewhere.
   * @param mode permission bits, the umask taken off
   */
  createFile(name: string, flags: number, mode: number, caller: Caller): Promise<{ node: FileNode; open: OpenFile }>;
  unlink(name: string, caller: Caller): Promise<void>;
  /** `noReplace`: RENAME_NOREPLACE. Exchanging two names is EINVAL before it comes here. */
  rename(name: string, target: DirectoryNode, newName: string, noReplace: boolean, caller: Caller): Promise<void>;
}

export interface FileNode extends NodeBase {
  readonly kind: 'file';
  /** `flags`: O_* of open(2) on this host. */
  open(flags: number, caller: Caller): Promise<OpenFile>;
}

export type Node = DirectoryNode | FileNode;

/** One open(2), until its release. */
export interface OpenFile {
  /** Slot of the shared handle table, if the data threads serve this file themselves; below DATA_HANDLES. */
  readonly slot: number | undefined;
  /** `direct`: nothing in the kernel's page cache. `keep`: pages of earlier opens stay valid. `fresh`: cached from now on. */
  readonly caching: 'direct' | 'keep' | 'fresh';
  /** The bytes at `offset`, fewer than `size` only at the end of the file. */
  read(offset: number, size: number, caller: Caller): Promise<Uint8Array>;
  /** Returns the bytes taken. `data` is valid until the promise settles. */
  write(offset: number, data: Uint8Array, sync: boolean, caller: Caller): Promise<number>;
  seek(offset: number, whence: number): Promise<number>;
  allocate(offset: number, length: number, mode: number): Promise<void>;
  /** close(2) of one descriptor; its error is close's. */
  flush(): Promise<void>;
  sync(): Promise<void>;
  release(): Promise<void>;
}

/** statfs(2), all in bytes but `files`. */
export interface FileSystemStatus {
  readonly blockBytes: number;
  readonly totalBytes: number;
  readonly freeBytes: number;
  readonly availableBytes: number;
  readonly files: number;
}

/** The kernel's caches, for changes that did not come through the kernel. Returns at once; the work is done behind. */
export interface Notifier {
  /** Attributes and all cached pages of the node are stale. */
  invalidateNode(ino: number): void;
  /** The name in that directory is stale. */
  invalidateEntry(parentIno: number, name: string): void;
}

/** How a driver starts threads that serve the data plane. */
export interface DataThreadSource {
  /**
   * Module of the thread. It calls `serveDevice(workerData.device, plane)` of fuse/data-thread.ts with a `DataPlane`
   * made from `workerData.plane`.
   */
  readonly entry: URL;
  /** `workerData.plane` for one new thread, with what must be transferred. */
  attach(): { readonly plane: unknown; readonly transfer: readonly TransferListItem[] };
}

export interface FileSystem {
  /** Absent: the driver serves everything through `OpenFile`. */
  readonly dataThreads: DataThreadSource | undefined;
  readonly root: DirectoryNode;
  status(): Promise<FileSystemStatus>;
  /** Called once by the driver, before the first request. */
  attachNotifier(notifier: Notifier): void;
}
