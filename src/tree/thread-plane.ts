/** A data thread's side of the open disk files: answers READ, WRITE and their kin from the shared table of slots. */
import { type MessagePort, receiveMessageOnPort } from 'node:worker_threads';
import debug from 'debug';
import type { Contents, SharedContents } from '../disk/disk.ts';
import { type Errno, FsError } from '../errors.ts';
import { DATA_HANDLES, type DataPlane, DEFER } from '../fuse/data-plane.ts';
import { errnoNumber } from '../os/errno.ts';
import { allocateRange, GATE_CLOSED, readRange, seekRange, writeGrowing, writeRange } from './byte-range.ts';
import { flag, SlotTable } from './slot-table.ts';

const log = debug('vdskfs:tree');

/** All that the main thread ever tells a data thread. */
export type ToDataThread =
  | { readonly kind: 'open'; readonly shared: SharedContents }
  | { readonly kind: 'closed'; readonly id: number };

/** All that a data thread ever tells: a request on these contents failed. The kernel's answer has the errno alone. */
export interface FromDataThread {
  readonly contentsId: number;
  readonly errno: Errno;
  readonly message: string;
}

/** `workerData.plane`. */
export interface PlaneData {
  readonly table: SharedArrayBuffer;
  readonly port: MessagePort;
  /** One word: odd while the thread uses contents, counting up. */
  readonly busy: SharedArrayBuffer;
}

/** No allocation on READ and WRITE, unless they fail. */
export class ThreadPlane implements DataPlane {
  readonly #table: SlotTable;
  readonly #port: MessagePort;
  readonly #attach: (shared: SharedContents) => Contents;
  readonly #contents = new Map<number, Contents>();
  readonly #busy: Int32Array;
  /** The table's generation when the port was last drained. */
  #drained: number;
  /** Where the request that was answered last has changed something. */
  #changed: Contents | undefined;

  constructor(data: PlaneData, attach: (shared: SharedContents) => Contents) {
    this.#table = new SlotTable(data.table);
    this.#port = data.port;
    this.#attach = attach;
    this.#busy = new Int32Array(data.busy);
    // Not the current one: what was posted before this thread started waits in the port.
    this.#drained = this.#table.generation() - 1;
  }

  read(fh: number, offset: number, size: number, reply: Uint8Array, at: number): number {
    try {
      const contents = this.#enter(fh);
      if (contents === undefined) return DEFER;
      return readRange(contents, this.#table.base(fh), this.#table.length(fh), offset, size, reply, at);
    } catch (error) {
      return this.#failed(fh, error);
    } finally {
      this.#leave();
    }
  }

  write(fh: number, offset: number, size: number, request: Uint8Array, at: number, sync: boolean): number {
    try {
      const contents = this.#enter(fh);
      if (contents === undefined || !this.#writable(fh)) return DEFER;
      const count = this.#grows(fh)
        ? writeGrowing(contents, offset, size, request, at)
        : writeRange(contents, this.#table.base(fh), this.#table.length(fh), offset, size, request, at);
      if (count === GATE_CLOSED) return DEFER;
      this.#changed = contents;
      if (sync) contents.flush();
      return count;
    } catch (error) {
      // What the failure of a guest's state leads to is the main thread's, which tries again and decides when to answer.
      return this.#grows(fh) && error instanceof FsError ? DEFER : this.#failed(fh, error);
    } finally {
      this.#leave();
    }
  }

  seek(fh: number, offset: number, whence: number): number {
    try {
      const contents = this.#enter(fh);
      if (contents === undefined) return DEFER;
      return seekRange(contents, this.#table.base(fh), this.#table.length(fh), offset, whence);
    } catch (error) {
      return this.#failed(fh, error);
    } finally {
      this.#leave();
    }
  }

  allocate(fh: number, offset: number, length: number, mode: number): number {
    try {
      const contents = this.#enter(fh);
      if (contents === undefined || !this.#writable(fh) || this.#grows(fh)) return DEFER;
      const done = allocateRange(contents, this.#table.base(fh), this.#table.length(fh), offset, length, mode);
      if (done === GATE_CLOSED) return DEFER;
      this.#changed = contents;
      return done;
    } catch (error) {
      return this.#failed(fh, error);
    } finally {
      this.#leave();
    }
  }

  /** Nothing to do: what write(2) acknowledged is in the engine, and close(2) promises no durability. */
  flush(fh: number): number {
    try {
      return this.#enter(fh) === undefined ? DEFER : 0;
    } finally {
      this.#leave();
    }
  }

  sync(fh: number): number {
    try {
      const contents = this.#enter(fh);
      if (contents === undefined) return DEFER;
      contents.flush();
      return 0;
    } catch (error) {
      return this.#failed(fh, error);
    } finally {
      this.#leave();
    }
  }

  tidy(): void {
    const contents = this.#changed;
    if (contents === undefined) return;
    this.#changed = undefined;
    Atomics.add(this.#busy, 0, 1);
    try {
      // The slot may be another file's by now. Where the main thread has something new to tell, the next write tidies up.
      if (this.#table.generation() === this.#drained) contents.tidy?.();
    } catch (error) {
      // The next request meets the same failure, and tells of it.
      log('tidying up after a write: %o', error);
    } finally {
      this.#leave();
    }
  }

  /**
   * This thread's contents of an open slot; undefined where the main thread must answer. From here to `#leave` they are
   * in use: said before the generation is looked at, so that whoever sees this thread idle after having advanced it
   * knows that the next use is of what was posted.
   */
  #enter(fh: number): Contents | undefined {
    Atomics.add(this.#busy, 0, 1);
    if (fh >= DATA_HANDLES) return undefined;
    if (this.#table.generation() !== this.#drained) this.#drain();
    return (this.#table.flags(fh) & flag.IN_USE) === 0 ? undefined : this.#contents.get(this.#table.contentsId(fh));
  }

  #leave(): void {
    Atomics.add(this.#busy, 0, 1);
  }

  #grows(fh: number): boolean {
    return (this.#table.flags(fh) & flag.GROWS) !== 0;
  }

  #writable(fh: number): boolean {
    return (this.#table.flags(fh) & flag.WRITABLE) !== 0;
  }

  #drain(): void {
    // Read first: a message posted meanwhile advances it again, and is at worst looked for once too often.
    this.#drained = this.#table.generation();
    for (;;) {
      const received = receiveMessageOnPort(this.#port) as { message: ToDataThread } | undefined;
      if (received === undefined) return;
      const { message } = received;
      if (message.kind === 'open') {
        try {
          this.#contents.set(message.shared.id, this.#attach(message.shared));
        } catch (error) {
          // The main thread has these contents too, and serves what this thread defers.
          log('data thread cannot attach contents %d: %o', message.shared.id, error);
        }
      } else {
        this.#contents.delete(message.id);
      }
    }
  }

  /** Returns the negated errno; the sentence goes to the main thread, for `control`. */
  #failed(fh: number, error: unknown): number {
    if (!(error instanceof FsError)) {
      log('bug in the data plane: %o', error);
      return -errnoNumber('EIO');
    }
    // ENXIO is the ordinary end of a walk over data and holes.
    if (error.errno !== 'ENXIO') {
      const { errno, message } = error;
      const contentsId = this.#table.contentsId(fh);
      this.#port.postMessage({ contentsId, errno, message } satisfies FromDataThread);
    }
    return -errnoNumber(error.errno);
  }
}
