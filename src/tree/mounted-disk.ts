/**
 * A disk as the tree serves it: the operations that both the directories and `control` offer, which of its files are
 * open, and the answer that `control` gives next.
 */
import debug from 'debug';
import { validateNewName } from '../disk/checkpoint-name.ts';
import type {
  Checkpoint,
  CheckpointKind,
  CompactReport,
  DeleteOptions,
  Disk,
  OpenContents,
  Operation,
} from '../disk/disk.ts';
import { validateOverlayName } from '../disk/overlay-files.ts';
import { FsError } from '../errors.ts';
import { type DataThreads, SharedOpening } from './data-threads.ts';
import type { IncomingDirectory } from './incoming-directory.ts';
import type { Machine } from './machine.ts';
import { OpenFiles } from './open-files.ts';
import { takeCheckpoint } from './take-checkpoint.ts';

const log = debug('vdskfs:tree');

const quote = (name: string): string => JSON.stringify(name);

/** Of what is not broken off. */
const UNINTERRUPTED = new AbortController().signal;

/** What `control` answers to what was done to a checkpoint, by a command or by a call on its directory. */
export const done = {
  taken: ({ name, id }: Checkpoint): string => `checkpoint ${quote(name)} taken, ID ${id}`,
  deleted: ({ name }: Checkpoint): string => `checkpoint ${quote(name)} deleted`,
  renamed: (old: string, { name }: Checkpoint): string => `checkpoint ${quote(old)} is now ${quote(name)}`,
};

export interface MountedDiskOptions {
  readonly disk: Disk;
  readonly threads: DataThreads;
  /** See OpenFiles. */
  readonly releaseGraceMs: number;
  /** The guest whose disk it is. */
  readonly machine: Machine;
  /** Where that guest writes its state. */
  readonly incoming: IncomingDirectory;
}

export interface TakeOptions {
  readonly kind: CheckpointKind;
  readonly withoutMemory?: boolean;
  readonly suspend?: boolean;
  /** Who asked waits no more. */
  readonly signal: AbortSignal;
}

export class MountedDisk {
  readonly disk: Disk;
  readonly threads: DataThreads;
  readonly machine: Machine;
  readonly incoming: IncomingDirectory;
  readonly openFiles: OpenFiles;
  readonly live: SharedOpening;
  #lastAnswer = '';

  constructor({ disk, threads, releaseGraceMs, machine, incoming }: MountedDiskOptions) {
    this.disk = disk;
    this.threads = threads;
    this.machine = machine;
    this.incoming = incoming;
    this.openFiles = new OpenFiles(releaseGraceMs);
    this.live = this.opening(() => disk.openLive());
  }

  /** For contents of this disk. */
  opening(open: () => OpenContents): SharedOpening {
    return new SharedOpening(open, this.threads, (error) => this.report(error));
  }

  operation(): Operation | undefined {
    return this.machine.operation?.() ?? this.disk.operation();
  }

  /** Why checkpoints are neither taken nor deleted; where the guest holds the image, it does that. */
  get fixed(): string | undefined {
    return this.disk.owner === 'attached' ? undefined : this.disk.readOnly;
  }

  /** What the disk's last command answered, or why the last refused call was refused. */
  get lastAnswer(): string {
    return this.#lastAnswer;
  }

  /** Keep what `work` answers for readers of `control`. */
  async answer(work: () => Promise<string>): Promise<string> {
    return this.attempt(async () => (this.#lastAnswer = await work()));
  }

  /** Keep the sentence of an error that `work` ends with for readers of `control`, and throw it on. */
  async attempt<T>(work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (error) {
      throw this.report(error);
    }
  }

  /** Keep the sentence for readers of `control`. Returns the error, to be thrown. */
  report<E>(error: E): E {
    if (error instanceof FsError) {
      log('%s: %s: %s', this.disk.name, error.errno, error.message);
      this.#lastAnswer = error.message;
    } else {
      log('%s: bug: %o', this.disk.name, error);
      this.#lastAnswer = 'vdskfs itself failed (EIO); its log has more.';
    }
    return error;
  }

  /** By the name shown, else the first with that real name; of any kind if none is given. @throws FsError ENOENT */
  find(name: string, kind?: CheckpointKind): Checkpoint {
    const checkpoints = this.disk.checkpoints().filter((checkpoint) => kind === undefined || checkpoint.kind === kind);
    const found =
      checkpoints.find((checkpoint) => checkpoint.name === name) ??
      checkpoints.find((checkpoint) => checkpoint.realName === name);
    const what = kind === 'external' ? 'overlay' : 'checkpoint';
    if (found === undefined) throw new FsError('ENOENT', `${this.disk.name} has no ${what} ${quote(name)}.`);
    return found;
  }

  /** With all disks of its guest, and the memory of that if it runs: see `takeCheckpoint`. */
  take(name: string, { kind, withoutMemory = false, suspend = false, signal }: TakeOptions): Promise<Checkpoint> {
    return takeCheckpoint(this.machine, { disk: this, kind, name, withoutMemory, suspend, signal });
  }

  /** @throws FsError EROFS, EEXIST where a new checkpoint cannot have this name */
  refuseNewName(kind: CheckpointKind, name: string): void {
    this.#refuseIfFixed();
    if (kind === 'external') validateOverlayName(name);
    this.#refuseIfTaken(kind, name);
  }

  /** @throws FsError EBUSY while a file of it is open, EROFS, and the disk's own */
  async delete(checkpoint: Checkpoint, options: DeleteOptions = {}): Promise<void> {
    this.#refuseIfFixed();
    await this.#inTurn(options.signal, () =>
      this.openFiles.whileUnopened(checkpoint, () => this.disk.deleteCheckpoint(checkpoint, options)),
    );
  }

  /**
   * Delete an external checkpoint, and with it what was written since.
   * @throws FsError as `delete`, and EBUSY while the guest runs or a live file is open for writing
   */
  async discard(checkpoint: Checkpoint): Promise<void> {
    this.#refuseIfReadOnly();
    const what = `discarding what was written since ${quote(checkpoint.name)}`;
    await this.machine.refuseIfAlive(`Discarding what was written to ${this.disk.name}`);
    await this.openFiles.exclusively(what, () => this.delete(checkpoint, { discard: true }));
  }

  /** @throws FsError EEXIST, EINVAL, ENAMETOOLONG, EROFS, and the disk's own */
  async rename(checkpoint: Checkpoint, newName: string): Promise<Checkpoint> {
    this.#refuseIfReadOnly();
    validateNewName(newName);
    if (checkpoint.name === newName) return checkpoint;
    this.#refuseIfTaken(checkpoint.kind, newName);
    return this.#inTurn(undefined, () => this.disk.renameCheckpoint(checkpoint, newName));
  }

  /**
   * @throws FsError EBUSY while the guest runs, and while a live file is open for writing: whoever writes takes the disk
   *   for its own
   */
  async rollback(checkpoint: Checkpoint): Promise<void> {
    await this.machine.refuseIfAlive(`Rolling back ${this.disk.name}`);
    this.#refuseIfReadOnly();
    await this.#inTurn(undefined, () =>
      this.openFiles.exclusively(`rollback to ${quote(checkpoint.name)}`, () => this.disk.rollback(checkpoint)),
    );
  }

  /** @throws FsError EROFS, and EBUSY while a live file is open for writing */
  async refuseIfWritten(what: string): Promise<void> {
    this.#refuseIfReadOnly();
    await this.openFiles.exclusively(what, async () => {});
  }

  /** Possible whoever has which of its files open. */
  async compact(signal: AbortSignal): Promise<CompactReport> {
    this.#refuseIfReadOnly();
    return this.disk.compact({ signal });
  }

  /** Growing is possible under a running guest, shrinking is not. `bytes`: the new virtual size. */
  async resize(bytes: number, options: { readonly shrink: boolean }): Promise<void> {
    this.#refuseIfReadOnly();
    if (bytes >= this.disk.virtualSize()) return this.#inTurn(undefined, () => this.disk.resize(bytes, options));
    if (!options.shrink) {
      throw new FsError(
        'EPERM',
        `${this.disk.name} has ${this.disk.virtualSize()} bytes and would lose what is beyond ${bytes}: say --shrink if that is meant.`,
      );
    }
    return this.#inTurn(undefined, () =>
      this.openFiles.exclusively(`shrinking ${this.disk.name}`, () => this.disk.resize(bytes, options)),
    );
  }

  /** Not while a checkpoint of the guest is on its way: the guest would stand still until this is done. */
  #inTurn<T>(signal: AbortSignal | undefined, work: () => Promise<T>): Promise<T> {
    return this.machine.inTurn(signal ?? UNINTERRUPTED, work);
  }

  #refuseIfReadOnly(): void {
    this.#refuseBecause(this.disk.readOnly);
  }

  #refuseIfFixed(): void {
    this.#refuseBecause(this.fixed);
  }

  #refuseBecause(reason: string | undefined): void {
    const { refusal = 'EROFS' } = this.disk;
    if (reason !== undefined) throw new FsError(refusal, `${this.disk.name} cannot be changed: ${reason}.`);
  }

  /** Real names count too: a second checkpoint of that name would be shown under another. */
  #refuseIfTaken(kind: CheckpointKind, name: string): void {
    const others = this.disk.checkpoints().filter((other) => other.kind === kind);
    if (others.some((other) => other.name === name || other.realName === name)) {
      throw new FsError('EEXIST', `${this.disk.name} has a checkpoint ${quote(name)} already.`);
    }
  }
}
