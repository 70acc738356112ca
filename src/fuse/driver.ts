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
  /** How long a data thread looks for the next request before it sleeps; 0: not at all. */
  readonly pollMicroseconds: number;
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

/**
 * Mount `fileSystem` and serve it. Resolves when the tree answers. This process must not hold a file of its own mount
 * open: starting a program closes it in the child, which waits for an answer that the waiting parent cannot give.
 * Nor may it exit before the mount has ended: `process.exit` waits for threads that wait for the kernel.
 */
export type Driver = (fileSystem: FileSystem, options: MountOptions) => Promise<Mounted>;
