/**
 * A virtual machine that uses a disk: what vdskfs needs of it, whatever hypervisor runs it. bhyve/ and qemu/ implement
 * this; who has no guest has no such object. Every failure is an FsError: ENOTSUP where this kind of guest has no such
 * thing, ENOTCONN where the guest does not run, ETIMEDOUT, EIO with what the guest said.
 */

/** `unknown`: it is there, but cannot be asked. */
export type GuestState = 'running' | 'paused' | 'off' | 'unknown';

export interface GuestStatus {
  /** It can be talked to, or at least its process is there. */
  readonly alive: boolean;
  readonly state: GuestState;
}

/** Where a guest is to write its state. */
export interface SaveTarget {
  /** An existing folder of the host, absolute; in a mounted tree or elsewhere. */
  readonly directory: string;
  /** Name of the memory file in it, short; other files are this name with an ending (`.kern`, `.meta`). */
  readonly name: string;
  /** The guest ends when its state is written. */
  readonly suspend: boolean;
  /**
   * Resolves when `name`, `name.kern` and `name.meta` have all been opened for writing and none of them is open any
   * more; never rejects, and perhaps never resolves. For guests that do not say themselves when they have finished.
   */
  readonly closed: Promise<void>;
  /**
   * For a guest that can wait before it ends for a suspend: called when its files are complete. Resolves when the
   * checkpoint is kept; rejects, with an FsError, where it could not be: the guest then runs on as if nothing had been.
   */
  keep(): Promise<void>;
  /** Gives up, with an FsError as its reason: the guest is let run again as far as that is possible. */
  readonly signal: AbortSignal;
}

/** What a checkpoint remembers of the guest whose memory it holds. Plain data, kept as JSON. */
export interface GuestIdentity {
  readonly kind: 'bhyve' | 'qemu';
  readonly name: string;
  /** Of the hypervisor, as it says it itself; bhyve restores with the same build only. */
  readonly version: string;
  /** Host release, for bhyve `kern.osreldate`; undefined where it means nothing. */
  readonly hostRelease: string | undefined;
  /** Arguments that the guest's process was started with, the program first; empty if they could not be had. */
  readonly argv: readonly string[];
}

export interface RestoreRequest {
  /** The memory file of the checkpoint, absolute. */
  readonly statePath: string;
  /** The same file under a name that stays short whatever the checkpoint is called: MOUNT/DISK/.by-id/N/state. */
  readonly shortStatePath: string;
  /** The live disk, absolute. */
  readonly diskPath: string;
  /** What the checkpoint remembers. */
  readonly saved: GuestIdentity | undefined;
}

export interface RestoreCommand {
  readonly argv: readonly string[];
  /** In sentences, what may keep the guest from coming back: another build, other devices. */
  readonly warnings: readonly string[];
}

/** File systems of the guest that stand still, by its agent. */
export interface FrozenFileSystems {
  thaw(): Promise<void>;
}

export interface Guest extends Disposable {
  readonly kind: 'bhyve' | 'qemu';
  readonly name: string;
  /** Never rejects. */
  status(): Promise<GuestStatus>;
  identity(): Promise<GuestIdentity>;
  /**
   * Write the guest's whole state. It stands still from before the first byte of the memory file is written until its
   * last byte has been. Resolves when all files are complete and the guest runs again (or has ended, for a suspend).
   */
  save(target: SaveTarget): Promise<void>;
  /**
   * Check the files that `save` has written against each other.
   * @throws FsError EIO saying what does not fit
   */
  validate(files: readonly StateFile[]): void;
  /** Let the guest's file systems stand still, where an agent answers; undefined where none does. */
  freezeFileSystems(): Promise<FrozenFileSystems | undefined>;
  restoreCommand(request: RestoreRequest): Promise<RestoreCommand>;

  /** Each answers with what there is to say, perhaps nothing. */
  pause(): Promise<string>;
  resume(): Promise<string>;
  reset(): Promise<string>;
  /** The hard way. */
  poweroff(): Promise<string>;
  nmi(): Promise<string>;
  stats(): Promise<string>;
  /** Words of `control`'s `guest …`, as they are. */
  forward(words: string): Promise<string>;

  /** Only of a guest whose own process holds the qcow2 image. */
  readonly attached: AttachedCheckpoints | undefined;
}

/** One file of a saved state. */
export interface StateFile {
  readonly name: string;
  readonly bytes: number;
  /** The bytes from `from` (else the first) to before `to` (else the last): memory may be too much to have as a whole. */
  read(from?: number, to?: number): Uint8Array;
}

/** Checkpoints that the guest's own process takes and deletes in the image that it holds. */
export interface AttachedCheckpoints {
  take(kind: 'internal' | 'external', name: string): Promise<void>;
  /** @param onProgress from 0 to 1, where the guest tells */
  delete(kind: 'internal' | 'external', name: string, onProgress: (fraction: number) => void): Promise<void>;
}
