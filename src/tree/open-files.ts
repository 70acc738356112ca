/** Which files of one disk are open: who keeps a checkpoint, who writes where, and who has to wait for whom. */
import type { Checkpoint } from '../disk/disk.ts';
import { FsError } from '../errors.ts';

/** One open file. */
export interface OpenRecord {
  /** Path inside the disk's directory, for messages. */
  readonly label: string;
  /** Whose file it is; undefined for a live one. Asked anew each time: a rename makes another `Checkpoint`. */
  readonly checkpoint: () => Checkpoint | undefined;
  /** The bytes it writes, `[start, end)`; undefined when it only reads. */
  readonly writes: { readonly start: number; readonly end: number } | undefined;
}

const quoted = (records: readonly OpenRecord[]): string =>
  [...new Set(records.map((record) => record.label))].join(', ');

export class OpenFiles {
  readonly #open = new Set<OpenRecord>();
  readonly #waiting = new Set<() => void>();
  readonly #releaseGraceMs: number;
  readonly #ending = new Set<Checkpoint>();
  /** What runs that needs the live contents to itself. */
  #exclusive: string | undefined;

  /**
   * @param releaseGraceMs how long a conflict with an open file is borne before it is refused. The kernel announces the
   * end of a file only after close(2) has returned, so a program that closes and goes on may overtake its own RELEASE.
   */
  constructor(releaseGraceMs: number) {
    this.#releaseGraceMs = releaseGraceMs;
  }

  /** Enter an opened file; call the result once, when it is released. @throws FsError EBUSY, ENOENT */
  add(record: OpenRecord): Promise<() => void> {
    return this.#whenClear(
      () => this.#overlapping(record),
      (others) => {
        if (record.writes !== undefined && this.#exclusive !== undefined) {
          throw new FsError('EBUSY', `${record.label} cannot be opened for writing while ${this.#exclusive} runs.`);
        }
        if (others.length > 0) {
          throw new FsError(
            'EBUSY',
            `${record.label} cannot be opened for writing: ${quoted(others)} is open for writing and shows some of the same bytes; close it first.`,
          );
        }
        const checkpoint = record.checkpoint();
        if (checkpoint !== undefined && this.#ending.has(checkpoint)) {
          throw new FsError('EBUSY', `${record.label} cannot be opened: its checkpoint is being deleted.`);
        }
        this.#open.add(record);
        return () => {
          this.#open.delete(record);
          for (const wake of [...this.#waiting]) wake();
        };
      },
    );
  }

  /**
   * Run `work`, which ends the checkpoint, and let no one open a file of it meanwhile.
   * @throws FsError EBUSY while a file of it is open, naming the files
   */
  async whileUnopened<T>(checkpoint: Checkpoint, work: () => Promise<T>): Promise<T> {
    await this.#whenClear(
      () => [...this.#open].filter((record) => record.checkpoint() === checkpoint),
      (open) => {
        const name = JSON.stringify(checkpoint.name);
        if (open.length > 0) throw new FsError('EBUSY', `Checkpoint ${name} is in use: ${quoted(open)} is open.`);
        if (this.#ending.has(checkpoint)) throw new FsError('EBUSY', `Checkpoint ${name} is being deleted already.`);
        this.#ending.add(checkpoint);
      },
    );
    try {
      return await work();
    } finally {
      this.#ending.delete(checkpoint);
    }
  }

  /**
   * Run `work` while no one has the live contents open for writing.
   * @throws FsError EBUSY while someone has, naming the files
   */
  async exclusively<T>(what: string, work: () => Promise<T>): Promise<T> {
    await this.#whenClear(
      () => this.writers(),
      (open) => {
        if (this.#exclusive !== undefined) throw new FsError('EBUSY', `${what} has to wait: ${this.#exclusive} runs.`);
        if (open.length > 0) {
          throw new FsError(
            'EBUSY',
            `${what} is not possible while the disk is in use: ${quoted(open)} is open for writing; stop the guest or detach the disk first.`,
          );
        }
        this.#exclusive = what;
      },
    );
    try {
      return await work();
    } finally {
      this.#exclusive = undefined;
    }
  }

  /** Files that someone writes. */
  writers(): readonly OpenRecord[] {
    return [...this.#open].filter((record) => record.writes !== undefined);
  }

  #overlapping({ label, writes }: OpenRecord): OpenRecord[] {
    if (writes === undefined) return [];
    return [...this.#open].filter(
      (other) =>
        other.label !== label &&
        other.writes !== undefined &&
        other.writes.start < writes.end &&
        writes.start < other.writes.end,
    );
  }

  /**
   * Call `act` as soon as nothing is in the way, or with what still is when the grace is over. Between the last look
   * and `act` nothing else runs: of two that wait for the same, one finds the other.
   */
  async #whenClear<T, R>(obstacles: () => readonly T[], act: (left: readonly T[]) => R): Promise<R> {
    const deadline = performance.now() + this.#releaseGraceMs;
    for (;;) {
      const found = obstacles();
      const leftMs = deadline - performance.now();
      if (found.length === 0 || leftMs <= 0) return act(found);
      await new Promise<void>((resolve) => {
        const wake = () => {
          clearTimeout(timer);
          this.#waiting.delete(wake);
          resolve();
        };
        const timer = setTimeout(wake, leftMs);
        this.#waiting.add(wake);
      });
    }
  }
}
