import { InvalidArgumentError } from 'commander';
import { describe, expect, it } from 'vitest';
import { guestArgument } from '../../src/cli/guest-options.ts';
import { Guests } from '../../src/cli/machines.ts';

describe('--guest', () => {
  it('says the guest of each disk, also of one with = in its name', () => {
    const guests = guestArgument('a=b=qmp:/run/x=y', guestArgument('vm1=bhyve:web'));
    expect([...guests]).toEqual([
      ['vm1', { kind: 'bhyve', name: 'web' }],
      ['a=b', { kind: 'qmp', socketPath: '/run/x=y' }],
    ]);
  });

  it.each(['', 'vm1', 'vm1=', 'vm1=web', '=none', 'vm1=nonesuch', 'vm1=bhyve:'])('refuses %j', (text) => {
    expect(() => guestArgument(text)).toThrow(InvalidArgumentError);
  });

  it('refuses a second guest for one disk', () => {
    expect(() => guestArgument('vm1=none', guestArgument('vm1=bhyve:web'))).toThrow(/vm1 has a guest already/);
  });
});

describe('the machines of a mount', () => {
  const machines = (disks: string[], ...words: string[]) => {
    let guests = new Map() as ReturnType<typeof guestArgument>;
    for (const word of words) guests = guestArgument(word, guests);
    return new Guests({ guests, configFile: undefined }).machinesOf(disks, { timeoutMs: 1, mountpoint: '/mnt' });
  };

  it('have the disks that were given the same guest, or are called as its VM', () => {
    const found = machines(['vm1', 'data', 'vm2', 'vm3', 'vm4'], 'data=bhyve:vm1', 'vm3=none', 'vm4=qmp:/run/vm4');
    expect(found.map(({ disks }) => disks)).toEqual([['vm1', 'data'], ['vm2'], ['vm4']]);
  });

  it('have a guest when they were told of it, else only while there is one', async () => {
    const [told, untold] = machines(['vm1', `vdskfs-${process.pid}`], 'vm1=bhyve:web');
    using guest = await told?.find();
    expect(guest?.name).toBe('web');
    expect(await untold?.find()).toBe(undefined);
  });

  it('remember the guest of a checkpoint where nothing was said of theirs', async () => {
    const [untold] = machines(['vm1']);
    const saved = { kind: 'bhyve', name: 'other', version: '1', hostRelease: undefined, argv: [] } as const;
    expect((await untold?.remembered(saved))?.name).toBe('other');
    expect((await untold?.remembered(undefined))?.name).toBe('vm1');
  });
});
