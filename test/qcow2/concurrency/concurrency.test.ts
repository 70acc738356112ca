/** Several threads on one image while snapshots come and go (DESIGN.md sections 3 and 4). */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { describe, expect, it } from 'vitest';
import type { Checkpoint, Disk } from '../../../src/disk/disk.ts';
import { createImage, type FormatOptions } from '../../../src/qcow2/create.ts';
import {
  CELL_BYTES,
  CELLS,
  kind,
  makeShared,
  PIECE_CELLS,
  PRIVATE_CELLS,
  phase,
  random,
  stamp,
  stampOf,
  word,
} from './cells.mjs';

const THREADS = 3;
/** What one variant may take. */
const RUN_MS = 3500;

/** The workers use what was built; so does this thread, since they share memory. */
const { openDisk } = (await import(
  new URL('../../../dist/disk/open-disk.js', import.meta.url).href
)) as typeof import('../../../src/disk/open-disk.ts');

type Shared = ReturnType<typeof makeShared>;

/** What each thread has done last at each cell, up to some operation of each thread. */
class History {
  readonly #shared: Shared;
  readonly #last = Array.from({ length: THREADS }, () => new Int32Array(CELLS));
  /** Operations replayed, per thread. */
  readonly upTo: number[] = new Array<number>(THREADS).fill(0);
  /** Stamps of the disk in which this generation began. */
  base = new Int32Array(CELLS);

  constructor(shared: Shared) {
    this.#shared = shared;
  }

  restart(base: Int32Array<ArrayBuffer>, done: readonly number[]): void {
    this.base = base;
    for (const last of this.#last) last.fill(0);
    for (const [thread, operation] of done.entries()) this.upTo[thread] = operation;
  }

  /**
   * Find, between `done` and `begun` operations of each thread, the one after which the thread's private cells were as
   * in `stamps`.
   * @returns in words why there is none
   */
  advanceTo(stamps: Int32Array, done: readonly number[], begun: readonly number[]): string | undefined {
    for (let thread = 0; thread < THREADS; thread++) {
      this.#replay(thread, done[thread] as number);
      while (!this.#matches(thread, stamps)) {
        if ((this.upTo[thread] as number) >= (begun[thread] as number)) {
          return `no prefix of thread ${thread}'s operations, ${done[thread]} to ${begun[thread]}: ${this.#firstWrong(thread, stamps)}`;
        }
        this.#replay(thread, (this.upTo[thread] as number) + 1);
      }
    }
    return undefined;
  }

  /**
   * In words which shared cell is not as the last operation of some thread left it; undefined if none. The private cells
   * do not tell whether operations on shared ones that followed, up to `begun`, were in time.
   */
  sharedProblem(stamps: Int32Array, begun: readonly number[]): string | undefined {
    for (let cell = PRIVATE_CELLS; cell < CELLS; cell++) {
      const found = stamps[cell] as number;
      let touched = false;
      let right = false;
      for (let thread = 0; thread < THREADS; thread++) {
        const last = this.#last[thread]?.[cell] as number;
        if (last === 0) continue;
        touched = true;
        if (found === (last > 0 ? stamp(thread, last) : 0)) right = true;
      }
      if (!touched) right = found === this.base[cell];
      if (!right && !this.#cameLater(cell, stamps, begun))
        return `shared cell ${cell} is ${found.toString(16)}, which no thread left there`;
    }
    return undefined;
  }

  #cameLater(cell: number, stamps: Int32Array, begun: readonly number[]): boolean {
    const found = stamps[cell];
    for (let thread = 0; thread < THREADS; thread++) {
      const log = this.#shared.logs[thread] as Int32Array;
      for (let next = (this.upTo[thread] as number) + 1; next <= (begun[thread] as number); next++) {
        const [first, count, done] = log.subarray((next - 1) * 3, next * 3) as unknown as [number, number, number];
        if (first < PRIVATE_CELLS) {
          // One that left a trace would have been replayed. Discarding zeros leaves none.
          if (done === kind.DISCARD && stamps.subarray(first, first + count).every((value) => value === 0)) continue;
          break;
        }
        if (cell < first || cell >= first + count) continue;
        if (found === (done === kind.WRITE ? stamp(thread, next) : 0)) return true;
      }
    }
    return false;
  }

  #replay(thread: number, operation: number): void {
    const log = this.#shared.logs[thread] as Int32Array;
    for (let next = (this.upTo[thread] as number) + 1; next <= operation; next++) {
      const [first, count, done] = log.subarray((next - 1) * 3, next * 3) as unknown as [number, number, number];
      this.#last[thread]?.fill(done === kind.WRITE ? next : -next, first, first + count);
      this.upTo[thread] = next;
    }
  }

  #matches(thread: number, stamps: Int32Array): boolean {
    return this.#wrongCell(thread, stamps) < 0;
  }

  #wrongCell(thread: number, stamps: Int32Array): number {
    const lasts = this.#last[thread] as Int32Array;
    for (let piece = thread; piece < PRIVATE_CELLS / PIECE_CELLS; piece += THREADS) {
      for (let cell = piece * PIECE_CELLS; cell < (piece + 1) * PIECE_CELLS; cell++) {
        const last = lasts[cell] as number;
        const expected = last === 0 ? this.base[cell] : last > 0 ? stamp(thread, last) : 0;
        if (stamps[cell] !== expected) return cell;
      }
    }
    return -1;
  }

  #firstWrong(thread: number, stamps: Int32Array): string {
    const cell = this.#wrongCell(thread, stamps);
    return `cell ${cell} is ${stamps[cell]?.toString(16)}, last operation ${this.#last[thread]?.[cell]}`;
  }
}

interface Picture {
  readonly stamps: Int32Array<ArrayBuffer>;
  readonly hash: string;
}

function pictureOf(open: ReturnType<Disk['openLive']>): Picture {
  const bytes = new Uint8Array(CELLS * CELL_BYTES);
  open.contents.read(bytes, 0, bytes.length, 0);
  const words = new Int32Array(bytes.buffer);
  const stamps = new Int32Array(CELLS);
  for (let cell = 0; cell < CELLS; cell++) {
    const found = stampOf(words, cell, cell);
    if (found === undefined) throw new Error(`cell ${cell} is torn or foreign`);
    stamps[cell] = found;
  }
  open[Symbol.dispose]();
  return { stamps, hash: createHash('sha1').update(bytes).digest('hex') };
}

/** The numbers of all threads at `from`. */
const counts = ({ words }: Shared, from: number): number[] =>
  Array.from({ length: THREADS }, (_, thread) => Atomics.load(words, from + thread));

const giveWay = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 5));

class Run {
  readonly #disk: Disk;
  readonly #shared: Shared;
  readonly #history: History;
  readonly #saved = new Map<Checkpoint, Picture>();
  readonly #below: (below: number) => number;
  readonly #failed: () => boolean;
  #number = 0;
  rollbacks = 0;

  constructor(disk: Disk, shared: Shared, seed: number, failed: () => boolean) {
    this.#disk = disk;
    this.#shared = shared;
    this.#history = new History(shared);
    this.#below = random(seed);
    this.#failed = failed;
  }

  get snapshots(): number {
    return this.#number;
  }

  async step(): Promise<void> {
    const saved = [...this.#saved.keys()];
    const one = saved[this.#below(Math.max(1, saved.length))];
    const dice = this.#below(12);
    if (one === undefined || (dice < 5 && saved.length < 4)) return this.#take();
    if (dice < 8) return this.#delete(one);
    if (dice < 10) return this.#compact(saved);
    return this.#rollBack(one);
  }

  async #take(): Promise<void> {
    const done = counts(this.#shared, word.DONE);
    const checkpoint = await this.#disk.takeCheckpoint(`s${this.#number++}`);
    const begun = counts(this.#shared, word.BEGUN);
    const picture = pictureOf(this.#disk.openCheckpoint(checkpoint));
    const problem =
      this.#history.advanceTo(picture.stamps, done, begun) ?? this.#history.sharedProblem(picture.stamps, begun);
    if (problem !== undefined) throw new Error(`snapshot ${checkpoint.name}: ${problem}`);
    this.#saved.set(checkpoint, picture);
  }

  async #compact(saved: readonly Checkpoint[]): Promise<void> {
    // What is open meanwhile has to follow what moves.
    const open = saved.map((checkpoint) => ({ checkpoint, view: this.#disk.openCheckpoint(checkpoint) }));
    await this.#disk.compact();
    for (const { checkpoint, view } of open) this.#expectPicture(checkpoint, pictureOf(view));
  }

  async #delete(checkpoint: Checkpoint): Promise<void> {
    this.#expectUnchanged(checkpoint);
    await this.#disk.deleteCheckpoint(checkpoint);
    this.#saved.delete(checkpoint);
  }

  #expectUnchanged(checkpoint: Checkpoint): void {
    this.#expectPicture(checkpoint, pictureOf(this.#disk.openCheckpoint(checkpoint)));
  }

  #expectPicture(checkpoint: Checkpoint, { hash }: Picture): void {
    if (hash !== this.#saved.get(checkpoint)?.hash) throw new Error(`snapshot ${checkpoint.name} has changed`);
  }

  /** The writers rest meanwhile, so that it is known what the disk holds; reads go on. */
  async #rollBack(checkpoint: Checkpoint): Promise<void> {
    const { words, base } = this.#shared;
    await this.#enter(phase.READ_ONLY);
    await this.#disk.rollback(checkpoint);
    const live = pictureOf(this.#disk.openLive());
    if (live.hash !== this.#saved.get(checkpoint)?.hash) throw new Error(`rolled back to another state`);
    base.set(live.stamps);
    this.#history.restart(live.stamps, counts(this.#shared, word.DONE));
    Atomics.add(words, word.GENERATION, 1);
    this.rollbacks++;
    await this.#enter(phase.RUN);
  }

  async #enter(which: number): Promise<void> {
    Atomics.store(this.#shared.words, word.PHASE, which);
    while (!this.#failed() && counts(this.#shared, word.IN_PHASE).some((now) => now !== which)) await giveWay();
  }

  /** All threads have ended: everything is known. */
  finish(): void {
    const done = counts(this.#shared, word.DONE);
    const { stamps } = pictureOf(this.#disk.openLive());
    const problem = this.#history.advanceTo(stamps, done, done) ?? this.#history.sharedProblem(stamps, done);
    if (problem !== undefined) throw new Error(`in the end: ${problem}`);
    for (const checkpoint of this.#saved.keys()) this.#expectUnchanged(checkpoint);
  }
}

interface Variant {
  readonly name: string;
  readonly format: Omit<FormatOptions, 'size'>;
  readonly cacheBytes: number;
  readonly seed: number;
}

const variants: readonly Variant[] = [
  { name: 'clusters of 64 KiB', format: {}, cacheBytes: 2 ** 20, seed: 11 },
  {
    name: 'clusters of 512 bytes, shared table by table',
    format: { clusterBytes: 512 },
    cacheBytes: 2 ** 20,
    seed: 15,
  },
  { name: 'clusters of 2 KiB, small caches', format: { clusterBytes: 2048 }, cacheBytes: 0, seed: 12 },
  { name: 'subclusters', format: { clusterBytes: 32768, extendedL2: true }, cacheBytes: 2 ** 20, seed: 13 },
  { name: 'version 2, clusters of 4 KiB', format: { version: 2, clusterBytes: 4096 }, cacheBytes: 2 ** 20, seed: 14 },
];

describe('threads that write, discard, flush and read while snapshots come and go and the file is compacted', () => {
  it.each(variants)('see no torn, foreign or lost cell; snapshots are instants: $name', async (variant) => {
    const folder = mkdtempSync(join(tmpdir(), 'vdskfs-threads-'));
    const workers: Worker[] = [];
    try {
      const path = join(folder, 'image.qcow2');
      createImage(path, { ...variant.format, size: CELLS * CELL_BYTES });
      const disk = await openDisk(path, { readOnly: false, cacheBytes: variant.cacheBytes });
      const shared = makeShared(THREADS);
      let failed = false;
      const ended = Array.from({ length: THREADS }, (_, thread) => {
        const worker = new Worker(new URL('./worker.mjs', import.meta.url), {
          workerData: { thread, threads: THREADS, seed: variant.seed, shared, disk: disk.openLive().shared },
        });
        workers.push(worker);
        return new Promise<{ error?: string; operations?: number }>((resolve) => {
          worker.once('message', resolve);
          worker.once('error', (error) => resolve({ error: String(error) }));
        }).then((result) => {
          failed ||= result.error !== undefined;
          return result;
        });
      });
      const run = new Run(disk, shared, variant.seed, () => failed);
      const end = Date.now() + RUN_MS;
      try {
        while (Date.now() < end && !failed) {
          await run.step();
          await giveWay();
        }
      } finally {
        Atomics.store(shared.words, word.PHASE, phase.STOP);
        for (const result of await Promise.all(ended)) expect(result).toEqual({ operations: expect.any(Number) });
      }
      run.finish();
      expect(run.snapshots).toBeGreaterThan(1);
      await disk.close();
      execFileSync('qemu-img', ['check', path], { stdio: 'pipe' });
    } finally {
      for (const worker of workers) await worker.terminate();
      rmSync(folder, { recursive: true });
    }
  });
});
