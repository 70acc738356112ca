/** From what `mount` was told of guests to the machines of the tree. */
import { bhyveGuestExists, openBhyveGuest } from '../guest/bhyve/bhyve-guest.ts';
import { BhyveHost } from '../guest/bhyve/release.ts';
import type { AttachedCheckpoints, Guest, GuestIdentity } from '../guest/guest.ts';
import { type GuestAddress, guestKey } from '../guest/guest-address.ts';
import { Monitor } from '../guest/qemu/monitor.ts';
import { QemuGuest } from '../guest/qemu/qemu-guest.ts';
import type { MachineOptions } from '../tree/machine.ts';
import type { GuestAddresses } from './guest-options.ts';

export interface GuestOptions {
  readonly guests: GuestAddresses;
  readonly configFile: string | undefined;
}

export type Machine = MachineOptions & { readonly disks: readonly string[] };

type Reachable = Exclude<GuestAddress, { kind: 'none' }>;

/**
 * The guests of a mount. A disk of which nothing was said belongs to the bhyve VM of the same name, whenever there is
 * one; disks with the same address belong to the same guest.
 */
export class Guests {
  readonly #options: GuestOptions;
  readonly #host = new BhyveHost();
  readonly #monitors = new Map<string, Monitor>();

  constructor(options: GuestOptions) {
    this.#options = options;
  }

  machinesOf(disks: readonly string[], options: Pick<Machine, 'timeoutMs' | 'mountpoint'>): Machine[] {
    const found = new Map<string, { readonly address: Reachable; readonly disks: string[] }>();
    for (const disk of disks) {
      const address = this.#addressOf(disk);
      if (address === undefined) continue;
      const key = guestKey(address);
      const machine = found.get(key) ?? { address, disks: [] };
      machine.disks.push(disk);
      found.set(key, machine);
    }
    return Array.from(found.values(), (machine) => {
      const told = machine.disks.some((name) => this.#options.guests.has(name));
      return {
        ...options,
        disks: machine.disks,
        find: async () => (told || (await this.#exists(machine.address)) ? this.#open(machine.address) : undefined),
        remembered: async (saved) => this.#open(told || saved === undefined ? machine.address : addressOfSaved(saved)),
      };
    });
  }

  /** Whether there is a guest that may hold the image of this disk. */
  async mayHold(disk: string): Promise<boolean> {
    const address = this.#addressOf(disk);
    if (address === undefined) return false;
    return this.#options.guests.has(disk) || this.#exists(address);
  }

  /** Who takes the checkpoints of an image that the guest itself has open; undefined if nobody said which guest that is. */
  holderOf(disk: string, image: string): AttachedCheckpoints | undefined {
    const address = this.#addressOf(disk);
    if (address?.kind === 'bhyve') {
      return openBhyveGuest({ name: address.name, host: this.#host, attached: true }).attached;
    }
    return address && this.#qemu(address.socketPath, image).attached;
  }

  #addressOf(disk: string): Reachable | undefined {
    const address = this.#options.guests.get(disk) ?? { kind: 'bhyve', name: disk };
    return address.kind === 'none' ? undefined : address;
  }

  async #exists(address: Reachable): Promise<boolean> {
    return address.kind === 'bhyve' && (await bhyveGuestExists({ name: address.name, host: this.#host }));
  }

  #open(address: Reachable): Guest {
    if (address.kind === 'qmp') return this.#qemu(address.socketPath);
    return openBhyveGuest({ name: address.name, configFile: this.#options.configFile, host: this.#host });
  }

  #qemu(socketPath: string, attachedImage?: string): QemuGuest {
    const monitor = this.#monitors.get(socketPath) ?? new Monitor(socketPath);
    this.#monitors.set(socketPath, monitor);
    return new QemuGuest({ socketPath, monitor, ...(attachedImage !== undefined && { attachedImage }) });
  }
}

/** Of a guest that is only asked how it was started. */
const addressOfSaved = ({ kind, name }: GuestIdentity): Reachable =>
  kind === 'bhyve' ? { kind, name } : { kind: 'qmp', socketPath: name };
