/**
 * Notices that a guest has died while its state is awaited. As long as bytes arrive it lives and is left alone: bhyve
 * answers nobody before it has finished, and has room for few who wait.
 */
import { FsError } from '../errors.ts';
import type { Guest } from '../guest/guest.ts';

const INTERVAL_MS = 4000;

/** How often in a row it must be found dead. A guest that is to end may need a moment until all is told. */
const STRIKES = { checkpoint: 2, suspend: 4 } as const;

export class GuestPulse implements Disposable {
  readonly #guest: Guest;
  readonly #bytes: () => number;
  readonly #strikesNeeded: number;
  readonly #died: (error: FsError) => void;
  #timer: NodeJS.Timeout | undefined;
  #lastBytes = 0;
  #strikes = 0;
  #ended = false;

  /** @param bytes how much has arrived */
  constructor(guest: Guest, bytes: () => number, suspend: boolean, died: (error: FsError) => void) {
    this.#guest = guest;
    this.#bytes = bytes;
    this.#strikesNeeded = suspend ? STRIKES.suspend : STRIKES.checkpoint;
    this.#died = died;
  }

  begin(): void {
    this.#timer = setTimeout(() => void this.#look(), INTERVAL_MS);
  }

  [Symbol.dispose](): void {
    this.#ended = true;
    clearTimeout(this.#timer);
  }

  async #look(): Promise<void> {
    const bytes = this.#bytes();
    const alive = bytes !== this.#lastBytes || (await this.#guest.status()).alive;
    if (this.#ended) return;
    this.#lastBytes = bytes;
    this.#strikes = alive ? 0 : this.#strikes + 1;
    if (this.#strikes < this.#strikesNeeded) return this.begin();
    this.#died(new FsError('EIO', `Guest ${this.#guest.name} died before its state was written.`));
  }
}
