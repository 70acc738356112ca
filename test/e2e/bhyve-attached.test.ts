/** A bhyve with libvdsk, which holds the image itself: checkpoints are forwarded, and shown once the image has them. */
import { mkdir, readdir, readFile, rmdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { type BhyveHost, installBhyve, withGuest } from '../stand-in/bhyve.ts';
import { type HoldingGuest, holdImage, isHeld } from '../stand-in/libvdsk.ts';
import { driver, type MountedTree, withMount } from './mount.ts';
import { runOk, withDirectory } from './run.ts';

const MIB = 2 ** 20;

interface Scene {
  readonly host: BhyveHost;
  readonly holder: HoldingGuest;
  readonly tree: MountedTree;
  readonly image: string;
  readonly vm: string;
  calls(): Promise<string[]>;
}

let serial = 0;

/** A guest that holds an image, which is mounted as attached. */
async function scene(body: (scene: Scene) => Promise<void>): Promise<void> {
  await withDirectory(async (directory) => {
    const host = await installBhyve(directory, { generation: 'A' });
    const image = join(directory, 'disk.qcow2');
    const log = join(directory, 'calls');
    serial += 1;
    const vm = `att${process.pid}-${serial}`;
    await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M']);
    const holder = await holdImage(host, image, log);
    try {
      await withGuest(host, vm, { disks: [] }, async () => {
        const args = ['--attached', 'disk', '--guest', `disk=bhyve:${vm}`, '--guest-timeout', '5'];
        await withMount(image, { args, env: host.env }, async (tree) => {
          const calls = async (): Promise<string[]> =>
            (await readFile(log, 'utf8').catch(() => '')).split('\n').filter((line) => line !== '');
          await body({ host, holder, tree, image, vm, calls });
          expect(await isHeld(image)).toBe(true);
        });
      });
    } finally {
      holder.kill();
      await holder.ended;
    }
    await runOk('qemu-img', ['check', image]);
  });
}

/** One byte of a file. */
async function byteAt(path: string, offset: number): Promise<number> {
  const text = await runOk('od', ['-An', '-tu1', `-j${offset}`, '-N1', path]);
  return Number(text);
}

describe('an attached guest', () => {
  it('takes and deletes internal checkpoints itself, and they are read while it goes on', () =>
    scene(async ({ holder, tree, vm, host, calls }) => {
      const checkpoint = (name: string): string => tree.path('disk', 'snapshots', name);
      await holder.write(1, 0, MIB);
      await mkdir(checkpoint('one'));
      await holder.write(2, 0, MIB);
      await mkdir(checkpoint('two'));
      await holder.write(3, 0, MIB);
      expect((await readdir(tree.path('disk', 'snapshots'))).sort()).toEqual(['one', 'two']);
      expect(await byteAt(join(checkpoint('one'), 'disk.raw'), 4096)).toBe(1);
      expect(await byteAt(join(checkpoint('two'), 'disk.raw'), 4096)).toBe(2);
      expect(await readdir(checkpoint('one'))).not.toContain('state');
      await rmdir(checkpoint('one'));
      expect(await readdir(tree.path('disk', 'snapshots'))).toEqual(['two']);
      await expect(mkdir(checkpoint('two'))).rejects.toMatchObject({ code: 'EEXIST' });
      const rest = `--vm=${vm} --rundir=${host.runDirectory}`;
      expect(await calls()).toEqual([
        `--checkpoint one ${rest}`,
        `--checkpoint two ${rest}`,
        `--del-checkpoint one ${rest}`,
      ]);
    }));

  // What follows is the same whoever speaks to the kernel.
  if (driver === 'native') {
    it('takes external ones itself', () =>
      scene(async ({ holder, tree, vm, host, calls }) => {
        const overlay = (name: string): string => tree.path('disk', 'overlays', name);
        await holder.write(1, 0, MIB);
        await mkdir(overlay('nightly'));
        expect(await readdir(tree.path('disk', 'overlays'))).toEqual(['nightly']);
        await holder.write(2, 0, MIB);
        expect(await byteAt(join(overlay('nightly'), 'disk.raw'), 4096)).toBe(1);
        await rmdir(overlay('nightly'));
        expect(await readdir(tree.path('disk', 'overlays'))).toEqual([]);
        expect(await byteAt(tree.path('disk', 'disk.raw'), 4096)).toBe(2);
        const rest = `nightly --vm=${vm} --rundir=${host.runDirectory}`;
        expect(await calls()).toEqual([`--ext-checkpoint ${rest}`, `--del-ext-checkpoint ${rest}`]);
      }));

    it('changes its image behind our back, which is seen', () =>
      scene(async ({ holder, tree, host }) => {
        const bhyvectl = join(host.bin, 'bhyvectl');
        expect(await readdir(tree.path('disk', 'snapshots'))).toEqual([]);
        for (const value of [1, 2, 3]) {
          await holder.write(value, 0, 8 * MIB);
          await runOk(bhyvectl, ['--checkpoint', `v${value}`]);
          await holder.write(value + 100, 4 * MIB, 8 * MIB);
        }
        expect((await readdir(tree.path('disk', 'snapshots'))).sort()).toEqual(['v1', 'v2', 'v3']);
        await runOk(bhyvectl, ['--del-checkpoint', 'v2']);
        await holder.write(9, 0, 16 * MIB);
        expect((await readdir(tree.path('disk', 'snapshots'))).sort()).toEqual(['v1', 'v3']);
        for (const value of [1, 3]) {
          const disk = tree.path('disk', 'snapshots', `v${value}`, 'disk.raw');
          expect(await byteAt(disk, 5 * MIB)).toBe(value);
          expect(await byteAt(disk, 10 * MIB)).toBe(value === 1 ? 0 : 102);
        }
      }));

    it('owns the image: nothing of it is written here', () =>
      scene(async ({ tree, image }) => {
        const control = tree.path('disk', 'control');
        await writeFile(control, 'status');
        expect(await readFile(control, 'utf8')).toMatch(/owner: attached\n.*\nkind: bhyve\nalive: yes/);
        const info = JSON.parse(await readFile(tree.path('disk', 'info.json'), 'utf8'));
        expect(info.owner).toBe('attached');
        await expect(writeFile(tree.path('disk', 'disk.raw'), 'x')).rejects.toThrow();
        expect(await isHeld(image)).toBe(true);
      }));

    it('that refuses is quoted, and one that does nothing is waited for as long as was said', () =>
      scene(async ({ tree, host }) => {
        const checkpoint = tree.path('disk', 'snapshots', 'none');
        const control = tree.path('disk', 'control');
        await writeFile(join(host.bin, 'bhyvectl'), '#!/bin/sh\necho the medium is full >&2\nexit 28\n');
        await expect(mkdir(checkpoint)).rejects.toMatchObject({ code: 'EIO' });
        expect(await readFile(control, 'utf8')).toContain('the medium is full');
        await writeFile(join(host.bin, 'bhyvectl'), '#!/bin/sh\nexit 0\n');
        await expect(mkdir(checkpoint)).rejects.toMatchObject({ code: 'ETIMEDOUT' });
        expect(await readdir(tree.path('disk', 'snapshots'))).toEqual([]);
      }));
  }
});
