/**
 * Looking for the next request before going to sleep in read(2).
 *
 * A client with one request at a time pays two wake-ups for each: the data thread's and its own. Waking a core that has
 * just gone idle costs more than everything else together, so one thread stays awake for a moment after each answer.
 * Where nothing comes it gives up more and more often, so that a mount that is seldom used burns nothing; where requests
 * queue already there is nothing to wait for.
 */

import { FsError } from '../errors.ts';
import type { DeviceAccess } from './device.ts';

/** Requests taken without looking after one was there at once: the queue is not empty. */
const QUEUED_SKIP = 64;
/** Requests taken without polling, at most, after polling was in vain. */
const VAIN_SKIP = 64;

export class Polling {
  readonly #isWaiting: () => boolean;
  #milliseconds: number;
  /** At most one thread polls: a second one would only take a core from the client. */
  readonly #polled: Int32Array;
  /** Requests still to be taken without polling. */
  #skip = 0;
  /** What `#skip` was set to when polling was last in vain; 0 after a success. */
  #lastSkip = 0;

  /** @param isWaiting whether a request waits now; throws FsError where that cannot be found out */
  constructor({ pollMicroseconds, polled }: Omit<DeviceAccess, 'fd' | 'requestBytes'>, isWaiting: () => boolean) {
    this.#isWaiting = isWaiting;
    this.#milliseconds = pollMicroseconds / 1000;
    this.#polled = new Int32Array(polled);
  }

  /** Returns when a request waits, or when it is better to sleep until one comes. */
  wait(): void {
    if (this.#milliseconds === 0) return;
    if (this.#skip > 0) {
      this.#skip--;
      return;
    }
    if (this.#look()) {
      this.#skip = QUEUED_SKIP;
      return;
    }
    if (Atomics.compareExchange(this.#polled, 0, 0, 1) !== 0) return;
    const found = this.#poll();
    Atomics.store(this.#polled, 0, 0);
    this.#lastSkip = found ? 0 : Math.min(VAIN_SKIP, this.#lastSkip * 2 + 1);
    this.#skip = this.#lastSkip;
  }

  /** The first look: without the C library there is no polling. */
  #look(): boolean {
    try {
      return this.#isWaiting();
    } catch (error) {
      if (!(error instanceof FsError)) throw error;
      this.#milliseconds = 0;
      return true;
    }
  }

  #poll(): boolean {
    const end = performance.now() + this.#milliseconds;
    do {
      if (this.#isWaiting()) return true;
    } while (performance.now() < end);
    return false;
  }
}
