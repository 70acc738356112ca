import { resolve } from 'node:path';
import { describe, expect, it } from 'vitest';
import { guestKey, parseGuestAddress } from '../../src/guest/guest-address.ts';

describe('the address of a guest', () => {
  it('is a VM of bhyve, a monitor socket of QEMU, or none', () => {
    expect(parseGuestAddress('bhyve:web=0')).toEqual({ kind: 'bhyve', name: 'web=0' });
    expect(parseGuestAddress('qmp:run/vm:1.sock')).toEqual({ kind: 'qmp', socketPath: resolve('run/vm:1.sock') });
    expect(parseGuestAddress('none')).toEqual({ kind: 'none' });
  });

  it.each(['', 'bhyve:', 'bhyve', 'qmp:', 'xen:vm', 'bhyve:a/b', 'nonesuch'])('is not %j', (text) => {
    expect(parseGuestAddress(text)).toBe(undefined);
  });

  it('is the same for two disks of one guest, however it is written', () => {
    const [one, other] = [parseGuestAddress('qmp:/run/vm.sock'), parseGuestAddress('qmp:/run/./vm.sock')];
    if (one?.kind !== 'qmp' || other?.kind !== 'qmp') throw new Error('no sockets');
    expect(guestKey(one)).toBe(guestKey(other));
    expect(guestKey(one)).not.toBe(guestKey({ kind: 'bhyve', name: '/run/vm.sock' }));
  });
});
