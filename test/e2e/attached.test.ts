/** A real QEMU that has the qcow2 image open itself: checkpoints go through QMP, and the tree shows them. */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, readdir, readFile, rmdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { driver, vdskfs, withMount } from './mount.ts';
import { runOk, withDirectory } from './run.ts';

/** A machine without a system: its disk stays as it is. */
async function withQemu(image: string, socket: string, body: () => Promise<void>): Promise<void> {
  const args = ['-machine', 'pc,accel=tcg', '-m', '32', '-display', 'none', '-serial', 'none', '-monitor', 'none'];
  const drive = ['-drive', `file=${image},format=qcow2,if=virtio`];
  const child = spawn('qemu-system-x86_64', [...args, ...drive, '-qmp', `unix:${socket},server=on,wait=off`], {
    stdio: ['ignore', 'ignore', 'inherit'],
  });
  const ended = new Promise((resolve) => child.once('close', resolve));
  try {
    await expect.poll(() => existsSync(socket), { timeout: 20_000 }).toBe(true);
    await body();
  } finally {
    child.kill('SIGKILL');
    await ended;
  }
}

const digest = async (path: string): Promise<string> => (await runOk('sha256sum', [path])).slice(0, 64);

// What differs by the driver is tested with served guests.
it.skipIf(driver === 'fuse-native')('a disk that QEMU has open is read, and has its checkpoints taken by QEMU', () =>
  withDirectory(async (directory) => {
    const image = join(directory, 'vm1.qcow2');
    const socket = join(directory, 'qmp');
    await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M']);
    await runOk('qemu-io', ['-f', 'qcow2', '-c', 'write -P 7 1M 1M', image]);
    await withQemu(image, socket, async () => {
      await mkdir(join(directory, 'empty'));
      const refused = await vdskfs(['mount', image, join(directory, 'empty')]);
      expect(refused).toMatchObject({ status: 1, stderr: expect.stringContaining('open for writing in qemu') });

      await withMount(image, { args: ['--guest', `vm1=qmp:${socket}`] }, async (tree) => {
        const path = (...names: string[]) => tree.path('vm1', ...names);
        await writeFile(path('control'), 'status');
        expect(await readFile(path('control'), 'utf8')).toMatch(/owner: attached\nguest: .*\nkind: qemu\nalive: yes\n/);
        expect(JSON.parse(await readFile(path('info.json'), 'utf8'))).toMatchObject({ owner: 'attached' });
        const before = await digest(path('disk.raw'));
        await expect(writeFile(path('disk.raw'), 'x', { flag: 'r+' })).rejects.toThrow('EROFS');

        await mkdir(path('snapshots', 'a'));
        await mkdir(path('overlays', 'x'));
        await expect(mkdir(path('snapshots', 'a'))).rejects.toThrow('EEXIST');
        expect([await readdir(path('snapshots')), await readdir(path('overlays'))]).toEqual([['a'], ['x']]);
        for (const view of [['disk.raw'], ['snapshots', 'a', 'disk.raw'], ['overlays', 'x', 'disk.raw']]) {
          expect(await digest(path(...view))).toBe(before);
        }
        await expect(rmdir(path('snapshots', 'a'))).rejects.toThrow('EBUSY'); // below what QEMU writes now
        await rmdir(path('overlays', 'x'));
        await rmdir(path('snapshots', 'a'));
        expect([await readdir(path('snapshots')), await readdir(path('overlays'))]).toEqual([[], []]);
        expect(await digest(path('disk.raw'))).toBe(before);
      });
    });
    await runOk('qemu-img', ['check', '-q', image]);
  }),
);
