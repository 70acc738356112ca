/** From what `mount` was told of guests to the machines of the tree. */
import { bhyveGuestExists, openBhyveGuest } from '../guest/bhyve/bhyve-guest.ts';
import { BhyveHost } from '../guest/bhyve/release.ts';
import type { Guest, GuestIdentity } from '../guest/guest.ts';
import { type GuestAddress, guestKey } from '../guest/guest-address.ts';
import { QemuGuest } from '../guest/qemu/qemu-guest.ts';
import type { MachineOptions } from '../tree/machine.ts';
import type { GuestAddresses } from './guest-options.ts';

export interface GuestOptions {
  readonly guests: GuestAddresses;
  readonly timeoutMs: number;
  readonly configFile: string | undefined;
  readonly mountpoint: string;
}

export type Machine = MachineOptions & { readonly disks: readonly string[] };

/**
 * The guests of these disks. One of which nothing was said belongs to the bhyve VM of the same name, whenever there is
 * one; disks with the same address belong to the same guest.
 */
export function machinesOf(disks: readonly string[], options: GuestOptions): Machine[] {
  const { guests, configFile, timeoutMs, mountpoint } = options;
  const host = new BhyveHost();
  const byGuest = new Map<string, string[]>();
  const addresses = new Map<string, GuestAddress & { kind: 'bhyve' | 'qmp' }>();
  for (const disk of disks) {
    const address = guests.get(disk) ?? { kind: 'bhyve', name: disk };
    if (address.kind === 'none') continue;
    const key = guestKey(address);
    addresses.set(key, address);
    byGuest.set(key, [...(byGuest.get(key) ?? []), disk]);
  }
  return Array.from(byGuest, ([key, names]) => {
    const address = addresses.get(key) as GuestAddress & { kind: 'bhyve' | 'qmp' };
    const told = names.some((name) => guests.has(name));
    const open = (): Guest =>
      address.kind === 'qmp'
        ? new QemuGuest({ socketPath: address.socketPath })
        : openBhyveGuest({ name: address.name, configFile, host });
    return {
      disks: names,
      timeoutMs,
      mountpoint,
      find: async () =>
        told || (address.kind === 'bhyve' && (await bhyveGuestExists({ name: address.name, host })))
          ? open()
          : undefined,
      remembered: async (saved: GuestIdentity | undefined) => {
        if (told || saved === undefined) return open();
        return saved.kind === 'qemu'
          ? new QemuGuest({ socketPath: saved.name })
          : openBhyveGuest({ name: saved.name, configFile, host });
      },
    };
  });
}
