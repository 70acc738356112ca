/** How users say which guest a disk belongs to: `bhyve:VMNAME`, `qmp:SOCKET` or `none`. */
import { resolve } from 'node:path';

export type GuestAddress =
  | { readonly kind: 'bhyve'; readonly name: string }
  /** `socketPath`: of QEMU's monitor, absolute. */
  | { readonly kind: 'qmp'; readonly socketPath: string }
  | { readonly kind: 'none' };

/** Undefined if it is none of these. */
export function parseGuestAddress(text: string): GuestAddress | undefined {
  if (text === 'none') return { kind: 'none' };
  const [, kind, rest] = /^(bhyve|qmp):(.+)$/s.exec(text) ?? [];
  if (rest === undefined) return undefined;
  if (kind === 'qmp') return { kind, socketPath: resolve(rest) };
  return rest.includes('/') ? undefined : { kind: 'bhyve', name: rest };
}

/** The same for two disks of one guest. */
export const guestKey = (address: GuestAddress & { kind: 'bhyve' | 'qmp' }): string =>
  address.kind === 'bhyve' ? `bhyve:${address.name}` : `qmp:${address.socketPath}`;
