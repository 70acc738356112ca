import type { FileSystem } from './filesystem.ts';

export interface MountOptions {
  /** Existing empty directory, absolute. */
  readonly mountpoint: string;
  /** Shown as the source in the list of mounts. */
  readonly source: string;
  readonly readOnly: boolean;
  /** Users other than the mounting one may enter. */
  readonly allowOther: boolean;
  /** Data threads; at least 1. */
  readonly threads: number;
}

/** What a driver can pass on; what it lacks, the tree's users do without, and tests skip by it. */
export interface DriverCapabilities {
  readonly seekData: boolean;
  readonly allocate: boolean;
  readonly notifications: boolean;
  /** Largest single READ or WRITE in bytes. */
  readonly requestBytes: number;
}

export interface Mounted {
  readonly capabilities: DriverCapabilities;
  /** Resolves when nothing is mounted any more, whoever unmounted; all open files are released by then. */
  readonly ended: Promise<void>;
  /** @throws FsError EBUSY while files are open, with what to do */
  unmount(): Promise<void>;
}

/** Mount `fileSystem` and serve it. Resolves when the tree answers. */
export type Driver = (fileSystem: FileSystem, options: MountOptions) => Promise<Mounted>;
