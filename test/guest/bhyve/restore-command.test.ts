import { describe, expect, it } from 'vitest';
import { composeRestoreCommand, type PresentGuest } from '../../../src/guest/bhyve/restore-command.ts';
import type { GuestIdentity, RestoreRequest } from '../../../src/guest/guest.ts';

const argv = ['bhyve', '-A', '-s', '3,virtio-blk,/mnt/vm1/disk.raw', '-l', 'bootrom,/fw.fd', 'web0'];
const saved: GuestIdentity = {
  kind: 'bhyve',
  name: 'web0',
  version: 'FreeBSD 14.1, bhyve 01',
  hostRelease: '1401000',
  argv,
};
const present: PresentGuest = { name: 'web0', version: saved.version, osreldate: 1_401_000, configured: undefined };
const request: RestoreRequest = {
  statePath: '/mnt/vm1/snapshots/good/state',
  shortStatePath: '/mnt/vm1/.by-id/1/state',
  diskPath: '/mnt/vm1/disk.raw',
  saved,
};

describe('the command line that restores a guest', () => {
  it('is the one that it was started with, and -r', () => {
    expect(composeRestoreCommand(request, present)).toEqual({
      argv: ['bhyve', '-r', request.statePath, ...argv.slice(1)],
      warnings: [],
    });
  });

  it('is that of the configuration, if there is one', () => {
    const configured = [...argv.slice(0, -1), '-S', 'web0'];
    expect(composeRestoreCommand(request, { ...present, configured }).argv).toEqual([
      'bhyve',
      '-r',
      request.statePath,
      ...configured.slice(1),
    ]);
  });

  it('shows the form, with the disk in it, where nothing is known', () => {
    const { argv: made, warnings } = composeRestoreCommand({ ...request, saved: { ...saved, argv: [] } }, present);
    expect(made.slice(0, 3)).toEqual(['bhyve', '-r', request.statePath]);
    expect(made).toContain('3,virtio-blk,/mnt/vm1/disk.raw');
    expect(made.at(-1)).toBe('web0');
    expect(warnings).toEqual([expect.stringContaining('replace the devices')]);
  });

  it.each([
    [1_401_000, 250],
    [1_300_139, 95],
    [undefined, 250],
  ])('on release %s takes the short name for a path of more than %i bytes', (osreldate, max) => {
    const path = (bytes: number): string => `/${'n'.repeat(bytes - 1)}`;
    const restored = (statePath: string): string | undefined =>
      composeRestoreCommand({ ...request, statePath }, { ...present, osreldate }).argv[2];
    expect(restored(path(max))).toBe(path(max));
    expect(restored(path(max + 1))).toBe(request.shortStatePath);
  });
});

describe('warnings', () => {
  const warnings = (change: {
    request?: Partial<RestoreRequest>;
    present?: Partial<PresentGuest>;
  }): readonly string[] =>
    composeRestoreCommand({ ...request, ...change.request }, { ...present, ...change.present }).warnings;

  it.each([
    ['another release', { present: { osreldate: 1_402_000 } }, ['kern.osreldate 1401000, this one has 1402000']],
    [
      'another build',
      { present: { version: 'FreeBSD 14.1, bhyve 02' } },
      ['saved by FreeBSD 14.1, bhyve 01, this host has'],
    ],
    [
      'no record of the build',
      { request: { saved: undefined }, present: { configured: argv } },
      ['does not say which bhyve'],
    ],
    ['a disk elsewhere', { request: { diskPath: '/other/vm1/disk.raw' } }, ["None of the guest's devices is the disk"]],
    [
      'other devices',
      { present: { configured: [...argv.slice(0, 4), '-s', '4,virtio-net,tap0', ...argv.slice(4)] } },
      ['-s 4,virtio-net,tap0 is new'],
    ],
    [
      'fewer devices',
      {
        request: { saved: { ...saved, argv: ['bhyve', '-s', '9,nvme,/d', ...argv.slice(1)] } },
        present: { configured: argv },
      },
      ['-s 9,nvme,/d is missing'],
    ],
    ['no boot ROM', { present: { configured: argv.filter((word) => !/^-l$|bootrom/.test(word)) } }, ['bhyveload']],
    ['a configuration in a file', { present: { configured: ['bhyve', '-k', '/etc/web0.conf', 'web0'] } }, []],
  ])('%s', (_what, change, expected) => {
    expect(warnings(change)).toEqual(expected.map((part) => expect.stringContaining(part)));
  });
});
