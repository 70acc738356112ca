/**
 * A virtual machine with those of its disks that are mounted here. Which guest it is may be known, or is looked for
 * each time: guests come and go while their disks stay mounted.
 */
import type { Operation } from '../disk/disk.ts';
import { FsError } from '../errors.ts';
import type { Guest, GuestIdentity, GuestStatus } from '../guest/guest.ts';
import type { MountedDisk } from './mounted-disk.ts';

export interface MachineOptions {
  /** A new object for the guest as it is now; undefined where there is none. Never called twice at once. */
  readonly find: () => Promise<Guest | undefined>;
  /** The guest that a checkpoint remembers, or that would belong here, running or not. */
  readonly remembered: (saved: GuestIdentity | undefined) => Promise<Guest>;
  /** How long a guest may take for a checkpoint. */
  readonly timeoutMs: number;
  /** Where the tree is mounted, absolute. */
  readonly mountpoint: string;
}

export interface MachineStatus extends GuestStatus {
  readonly kind: Guest['kind'] | 'none';
  /** Undefined without a guest. */
  readonly name: string | undefined;
}

const NO_GUEST: MachineStatus = { kind: 'none', name: undefined, alive: false, state: 'off' };

export class Machine {
  readonly timeoutMs: number;
  readonly mountpoint: string;
  readonly disks: MountedDisk[] = [];
  /** What runs that concerns the guest; the disks know of their own operations. */
  operation: (() => Operation) | undefined;
  readonly remembered: MachineOptions['remembered'];
  readonly #find: MachineOptions['find'];
  #shared: { readonly guest: Promise<Guest | undefined>; uses: number } | undefined;
  #lastStatus: MachineStatus = NO_GUEST;
  /** As the guest told it when it ran: one that is off tells none. */
  #name: string | undefined;
  /** The last of the checkpoints under way, which are taken one after another; never rejects. */
  #queue: Promise<unknown> = Promise.resolve();

  constructor({ find, remembered, timeoutMs, mountpoint }: MachineOptions) {
    this.remembered = remembered;
    this.#find = find;
    this.timeoutMs = timeoutMs;
    this.mountpoint = mountpoint;
  }

  /** As it was when somebody last asked: costs nothing. */
  get lastStatus(): MachineStatus {
    return this.#lastStatus;
  }

  async status(): Promise<MachineStatus> {
    return this.withGuest((guest) => this.statusOf(guest));
  }

  async statusOf(guest: Guest | undefined): Promise<MachineStatus> {
    if (guest === undefined) return (this.#lastStatus = NO_GUEST);
    const { alive, state } = await guest.status();
    if (alive) this.#name = guest.name;
    return (this.#lastStatus = { kind: guest.kind, name: this.#name ?? guest.name, alive, state });
  }

  /** Run `work` with the guest as it is now. Whoever asks while another still works with it gets the same object. */
  async withGuest<T>(work: (guest: Guest | undefined) => Promise<T>): Promise<T> {
    const shared = (this.#shared ??= { guest: this.#find(), uses: 0 });
    shared.uses++;
    try {
      const guest = await shared.guest;
      if (guest === undefined) this.#forget(shared);
      return await work(guest);
    } finally {
      if (--shared.uses === 0) {
        this.#forget(shared);
        (await shared.guest.catch(() => undefined))?.[Symbol.dispose]();
      }
    }
  }

  /** Run `work` after those before it. @throws the reason of `signal`, if it aborts before its turn */
  inTurn<T>(signal: AbortSignal, work: () => Promise<T>): Promise<T> {
    let begun = false;
    const turn = this.#queue.then(() => {
      signal.throwIfAborted();
      begun = true;
      return work();
    });
    this.#queue = turn.catch(() => {});
    return new Promise((resolve, reject) => {
      const abort = () => begun || reject(signal.reason);
      signal.addEventListener('abort', abort);
      turn.then(resolve, reject).finally(() => signal.removeEventListener('abort', abort));
    });
  }

  /** @throws FsError EBUSY while the guest runs on these disks */
  async refuseIfAlive(what: string): Promise<void> {
    const { alive, name } = await this.status();
    if (alive) throw new FsError('EBUSY', `${what} is not possible while guest ${name} runs: end it first.`);
  }

  #forget(shared: { readonly guest: Promise<Guest | undefined> }): void {
    if (this.#shared === shared) this.#shared = undefined;
  }
}
