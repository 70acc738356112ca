/** Guests with disks in a mount, from mkdir to `vdskfs restore`; the hypervisor is the stand-in for bhyve. */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, readdir, readFile, rmdir, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { type BhyveHost, installBhyve, type RunningGuest, startGuest } from '../stand-in/bhyve.ts';
import { driver, launcher, type MountedTree, vdskfs, withMount } from './mount.ts';
import { run, runOk, withDirectory } from './run.ts';

/** Unique on this host: guests are found by their names. */
const NAME = `vm${process.pid}`;

interface Place {
  readonly host: BhyveHost;
  readonly tree: MountedTree;
  readonly images: readonly string[];
  /** The paths of the disks in the tree. */
  readonly disks: readonly string[];
  start(...args: string[]): Promise<RunningGuest>;
}

/** A guest with two disks, served by one mount. */
function withTwoDisks(body: (place: Place) => Promise<void>, ...args: string[]): Promise<void> {
  return withDirectory(async (directory) => {
    const host = await installBhyve(directory);
    const images = [join(directory, `${NAME}.qcow2`), join(directory, 'data.qcow2')];
    for (const image of images) await vdskfs(['create', image, '64M']);
    const guests: RunningGuest[] = [];
    const options = { env: host.env, args: ['--guest', `data=bhyve:${NAME}`, ...args] };
    try {
      await withMount(images, options, async (tree) => {
        const disks = [tree.path(NAME, 'disk.raw'), tree.path('data', 'disk.raw')];
        const start = async (...words: string[]) => {
          const guest = await startGuest(host, NAME, { disks, args: words, delayUs: 300 });
          guests.push(guest);
          return guest;
        };
        try {
          await body({ host, tree, images, disks, start });
        } finally {
          for (const guest of guests) guest.kill();
          await Promise.all(guests.map(({ ended }) => ended));
        }
      });
      for (const image of images) await runOk('qemu-img', ['check', image]);
    } finally {
      for (const guest of guests) guest.kill();
    }
  });
}

const snapshots = (tree: MountedTree, disk: string): Promise<string[]> => readdir(tree.path(disk, 'snapshots'));
const control = (tree: MountedTree, disk = NAME): Promise<string> => readFile(tree.path(disk, 'control'), 'utf8');
const command = (tree: MountedTree, line: string, disk = NAME): Promise<void> =>
  writeFile(tree.path(disk, 'control'), line);

/** `vdskfs restore`, until the guest says that it was restored. @returns what it said */
async function restored(place: Place, disk: string, name: string): Promise<string> {
  const { host, tree, disks } = place;
  const devices = disks.flatMap((path, index) => ['-s', `${index + 3},virtio-blk,${path}`]);
  const words = [join(host.bin, 'bhyve'), '-A', '-o', `rundir=${host.runDirectory}`, '-m', '1048576', ...devices, NAME];
  const args = [launcher, 'restore', tree.path(disk), name, '--', ...words];
  const child = spawn(process.execPath, args, {
    env: { ...process.env, ...host.env, BHYVE_THREADS: '0' },
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const ended = new Promise<number | null>((resolve) => child.once('close', resolve));
  try {
    let text = '';
    return await new Promise((resolve, reject) => {
      child.stdout.on('data', (part: Buffer) => {
        text += part;
        const line = /^(restored|inconsistent) .*$/m.exec(text);
        if (line !== null) resolve(line[0]);
      });
      void ended.then((status) => reject(new Error(`restore ended with ${status}: ${text}`)));
    });
  } finally {
    child.kill('SIGTERM');
    await ended;
  }
}

// Without the kernel's page cache no file can be mapped, which bhyve does when it restores.
const restores = driver !== 'fuse-native';

it('checkpoints all disks and the memory at one instant, and restores them', () =>
  withTwoDisks(async (place) => {
    const { tree } = place;
    const guest = await place.start();
    await mkdir(tree.path('data', 'snapshots', 'a'));
    expect([await snapshots(tree, NAME), await snapshots(tree, 'data')]).toEqual([['a'], ['a']]);
    expect((await readdir(tree.path('data', 'snapshots', 'a'))).sort()).toEqual([
      'disk.raw',
      'info.json',
      'partitions',
      'state',
      'state.kern',
      'state.meta',
    ]);
    expect((await stat(tree.path('data', 'snapshots', 'a', 'state'))).size).toBe(1 << 20);
    const info = JSON.parse(await readFile(tree.path('data', 'snapshots', 'a', 'info.json'), 'utf8'));
    expect(info).toMatchObject({ consistency: 'memory', guest: { kind: 'bhyve', name: NAME } });
    expect(await readdir(tree.path(NAME))).not.toContain('.incoming');
    expect(existsSync(tree.path('data', '.incoming', '1'))).toBe(false);

    const [mounted] = JSON.parse((await vdskfs(['status', '--json', tree.mountpoint])).stdout);
    expect(mounted.disks.map((disk: { guest: unknown }) => disk.guest)).toEqual(
      Array.from({ length: 2 }, () => ({ kind: 'bhyve', name: NAME, alive: true })),
    );
    await expect(command(tree, 'rollback a', 'data')).rejects.toThrow('EBUSY');
    expect(await vdskfs(['restore', tree.path('data'), 'a', '--', 'bhyve', NAME])).toMatchObject({ status: 1 });

    guest.kill();
    await guest.ended;
    if (restores) expect(await restored(place, 'data', 'a')).toMatch(/^restored \d+/);
    await rmdir(tree.path('data', 'snapshots', 'a'));
    expect([await snapshots(tree, NAME), await snapshots(tree, 'data')]).toEqual([['a'], []]);
  }));

it.runIf(restores)('suspends the guest, and restores it from under a name that is too long for bhyve', () =>
  withTwoDisks(async (place) => {
    const { tree } = place;
    const name = 'n'.repeat(250);
    const guest = await place.start();
    await command(tree, `suspend ${name}`);
    await guest.ended;
    await command(tree, 'status');
    expect(await control(tree)).toMatch(/alive: no\nstate: off\noperation: idle\n/);
    await command(tree, `restore-command ${name}`);
    expect(await control(tree)).toContain(`-r ${tree.path(NAME, '.by-id', '1', 'state')} `);
    expect(await restored(place, NAME, name)).toMatch(/^restored \d+/);
  }),
);

it.each(['die 6', 'hang 6', 'unsavable', 'nonsense'] as const)(
  'leaves no trace of a checkpoint whose guest does: %s',
  (fault) =>
    withTwoDisks(
      async (place) => {
        const { tree } = place;
        const guest = await place.start();
        await guest.setFault(fault);
        await expect(mkdir(tree.path(NAME, 'snapshots', 'a'))).rejects.toThrow(
          fault === 'hang 6' ? 'ETIMEDOUT' : 'EIO',
        );
        expect(await control(tree)).toMatch(/\S+ \S+/);
        expect([await snapshots(tree, NAME), await snapshots(tree, 'data')]).toEqual([[], []]);
        await writeFile(tree.path('data', 'disk.raw'), 'served', { flag: 'r+' });
        if (fault === 'die 6' || fault === 'hang 6') return;
        await guest.setFault('fine');
        await mkdir(tree.path(NAME, 'snapshots', 'a'));
      },
      '--guest-timeout',
      '3',
    ),
);

// The package fuse-native does not tell of interrupts.
it.skipIf(driver === 'fuse-native')('gives a checkpoint up when mkdir is interrupted, and lets the guest run', () =>
  withTwoDisks(async (place) => {
    const { tree } = place;
    const guest = await place.start();
    await guest.setFault('hang 6');
    const path = tree.path(NAME, 'snapshots', 'a');
    const making = run('timeout', ['--signal=INT', '2', 'mkdir', path]);
    expect(await making).toMatchObject({ status: 124 });
    await expect.poll(() => control(tree)).toMatch(/interrupted/);
    expect([await snapshots(tree, NAME), await snapshots(tree, 'data')]).toEqual([[], []]);
  }),
);
