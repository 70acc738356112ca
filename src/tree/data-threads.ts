/** The main thread's side of the data threads: which contents they know, and which fh shows which part of them. */
import { setTimeout as sleep } from 'node:timers/promises';
import { MessageChannel, type MessagePort } from 'node:worker_threads';
import type { OpenContents, SharedContents } from '../disk/disk.ts';
import { FsError } from '../errors.ts';
import type { DataThreadSource } from '../fuse/filesystem.ts';
import { type OpenRange, SlotTable } from './slot-table.ts';
import type { FromDataThread, PlaneData, ToDataThread } from './thread-plane.ts';

interface Published {
  /** Whose `shared` the threads know; another one after the layers of its disk have changed. */
  readonly opened: Pick<OpenContents, 'shared'>;
  told: SharedContents;
  /** Hears of the requests that a data thread answered with an error. */
  readonly report: (error: FsError) => void;
}

export class DataThreads implements DataThreadSource {
  readonly entry = new URL('./data-thread.js', import.meta.url);
  readonly #table = new SlotTable();
  readonly #ports = new Set<MessagePort>();
  /** Of each thread: odd while it uses contents, counting up. */
  readonly #busy = new Set<Int32Array>();
  readonly #published = new Map<number, Published>();

  attach(): { plane: PlaneData; transfer: MessagePort[] } {
    const { port1: ours, port2: theirs } = new MessageChannel();
    for (const { told } of this.#published.values())
      ours.postMessage({ kind: 'open', shared: told } satisfies ToDataThread);
    const busy = new SharedArrayBuffer(4);
    const counter = new Int32Array(busy);
    this.#ports.add(ours);
    this.#busy.add(counter);
    ours.on('close', () => {
      this.#ports.delete(ours);
      this.#busy.delete(counter);
    });
    ours.on('message', ({ contentsId, errno, message }: FromDataThread) =>
      this.#published.get(contentsId)?.report(new FsError(errno, message)),
    );
    ours.unref();
    return { plane: { table: this.#table.shared, port: theirs, busy }, transfer: [theirs] };
  }

  /** Make contents known to all threads, also to later ones, before a slot refers to them. */
  publish(opened: Pick<OpenContents, 'shared'>, report: (error: FsError) => void): void {
    const { shared } = opened;
    this.#published.set(shared.id, { opened, told: shared, report });
    this.#tell({ kind: 'open', shared });
  }

  withdraw({ id }: SharedContents): void {
    this.#published.delete(id);
    this.#tell({ kind: 'closed', id });
  }

  /**
   * Layers of a disk have changed: tell the threads at once what the contents stand on now. Resolves when none of them
   * uses what it knew before.
   */
  async republish(): Promise<void> {
    for (const published of this.#published.values()) {
      const { shared } = published.opened;
      if (shared === published.told) continue;
      published.told = shared;
      this.#tell({ kind: 'open', shared });
    }
    await this.idle();
  }

  /** Resolves when every use of contents that now runs in a data thread has ended. */
  async idle(): Promise<void> {
    await Promise.all(Array.from(this.#busy, (counter) => whenIdle(counter, () => this.#busy.has(counter))));
  }

  /** fh of a newly opened file, or undefined if the threads have no room for it. Give back with `freeSlot`. */
  takeSlot(range: OpenRange): number | undefined {
    return this.#table.take(range);
  }

  /** Let an open file show contents that were published, or NO_CONTENTS. */
  showInSlot(slot: number, contentsId: number): void {
    this.#table.show(slot, contentsId);
  }

  freeSlot(slot: number): void {
    this.#table.free(slot);
  }

  close(): void {
    for (const port of this.#ports) port.close();
    this.#ports.clear();
  }

  #tell(message: ToDataThread): void {
    for (const port of this.#ports) port.postMessage(message);
    this.#table.advanceGeneration();
  }
}

/** Resolves when a use of contents that runs now has ended, at once if none does. */
async function whenIdle(counter: Int32Array, lives: () => boolean): Promise<void> {
  const seen = Atomics.load(counter, 0);
  if (seen % 2 === 0) return;
  while (Atomics.load(counter, 0) === seen && lives()) await sleep(1);
}

/**
 * One `OpenContents` for all open files that show the same contents: opened with the first, closed with the last, and
 * known to the data threads in between.
 */
export class SharedOpening {
  readonly #open: () => OpenContents;
  readonly #threads: DataThreads;
  readonly #report: (error: FsError) => void;
  #opened: OpenContents | undefined;
  #uses = 0;

  /** @param report hears of the requests that a data thread answered with an error */
  constructor(open: () => OpenContents, threads: DataThreads, report: (error: FsError) => void) {
    this.#open = open;
    this.#threads = threads;
    this.#report = report;
  }

  /** Each call wants its `release`. */
  acquire(): OpenContents {
    if (this.#opened === undefined) {
      this.#opened = this.#open();
      this.#threads.publish(this.#opened, this.#report);
    }
    this.#uses++;
    return this.#opened;
  }

  release(): void {
    if (--this.#uses > 0 || this.#opened === undefined) return;
    const opened = this.#opened;
    this.#opened = undefined;
    this.#threads.withdraw(opened.shared);
    opened[Symbol.dispose]();
  }
}
