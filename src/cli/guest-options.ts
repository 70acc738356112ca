/** What `mount` is told of guests. */
import { InvalidArgumentError } from 'commander';
import { type GuestAddress, parseGuestAddress } from '../guest/guest-address.ts';

/** Seconds. bhyve writes a gigabyte in a few of them. */
export const DEFAULT_GUEST_TIMEOUT = 120;

/** By the names of the disks. */
export type GuestAddresses = ReadonlyMap<string, GuestAddress>;

/** For commander: one more DISK=ADDRESS. */
export function guestArgument(text: string, before: GuestAddresses = new Map()): GuestAddresses {
  const [, disk, rest] = /^(.+?)=((?:bhyve:|qmp:|none$).*)$/s.exec(text) ?? [];
  const address = rest === undefined ? undefined : parseGuestAddress(rest);
  if (disk === undefined || address === undefined) {
    throw new InvalidArgumentError('Give DISK=bhyve:VMNAME, DISK=qmp:SOCKET or DISK=none.');
  }
  if (before.has(disk)) throw new InvalidArgumentError(`The disk ${disk} has a guest already.`);
  return new Map([...before, [disk, address]]);
}

/** For commander: one more DISK. */
export const diskArgument = (disk: string, before: ReadonlySet<string> = new Set()): ReadonlySet<string> =>
  new Set([...before, disk]);
