/** The commands on image files and on running mounts, as a user types them. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, existsSync, mkdirSync, openSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { processStart } from '../../src/cli/process.ts';
import { driver, launcher, type MountedTree, startServer, stop, vdskfs, withMount } from './mount.ts';
import { type Finished, run, runOk, withDirectory } from './run.ts';

/** Run a command of vdskfs that must succeed. @returns its standard output */
async function done(...args: string[]): Promise<string> {
  const result = await vdskfs(args);
  expect({ args, status: result.status, stderr: result.stderr }).toEqual({ args, status: 0, stderr: '' });
  return result.stdout;
}

/** One that must fail: status 1 and one line. @returns the line, without the program's name */
function failure(result: Finished): string {
  expect(result).toMatchObject({ status: 1, stdout: '' });
  expect(result.stderr).toMatch(/^vdskfs: [^\n]+\n$/);
  return result.stderr.slice('vdskfs: '.length, -1);
}

const failed = async (...args: string[]): Promise<string> => failure(await vdskfs(args));

/** A fresh directory with an image `vm1.qcow2` of 16 MiB and an empty folder `mnt`. */
const withImage = (body: (place: { directory: string; image: string; mountpoint: string }) => Promise<void>) => () =>
  withDirectory(async (directory) => {
    const [image, mountpoint] = [join(directory, 'vm1.qcow2'), join(directory, 'mnt')];
    mkdirSync(mountpoint);
    await done('create', image, '16M');
    await body({ directory, image, mountpoint });
  });

const inDirectory = (body: (directory: string) => Promise<void>) => () => withDirectory(body);

/** `withImage`, and whatever is left mounted there is taken away, and its process ended, however `body` ends. */
const withMountpoint = (body: (place: { directory: string; image: string; mountpoint: string }) => Promise<void>) =>
  withImage(async (place) => {
    try {
      await body(place);
    } finally {
      const [left] = await statuses(place.mountpoint);
      if (left !== undefined) await run('umount', ['-l', place.mountpoint]);
      if (left?.pid) process.kill(left.pid, 'SIGKILL');
    }
  });

interface Status {
  mountpoint: string;
  state: string;
  pid: number | null;
  driver: string;
  readOnly: boolean;
  disks: { name: string; image: string }[];
}

async function statuses(mountpoint: string): Promise<Status[]> {
  const all = JSON.parse(await done('status', '--json')) as Status[];
  return all.filter((one) => one.mountpoint === mountpoint);
}

/** A process that has ended but was not waited for yet does not live. */
const isAlive = (pid: number | null | undefined): boolean => processStart(pid ?? 0) !== undefined;

/** Resolves when the server has printed `text`; the test's own time limit ends a wait in vain. */
async function logged(tree: MountedTree, text: string): Promise<void> {
  while (!tree.log().includes(text)) await sleep(10);
}

/**
 * The image's refcount block of 16-bit refcounts, and how many of them are in use from its start. The images here have
 * one block, at cluster 2 of 64 KiB, and no holes.
 */
function refcountBlock(image: string): { at: number; used: number; bytes: Buffer } {
  const bytes = readFileSync(image);
  const at = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(48)))); // refcount_table_offset, its first entry
  let used = 0;
  while (bytes.readUInt16BE(at + 2 * used) > 0) used++;
  return { at, used, bytes };
}

/** Give a refcount to a cluster that nothing refers to. */
function leakCluster(image: string): void {
  const { at, used, bytes } = refcountBlock(image);
  bytes.writeUInt16BE(1, at + 2 * used);
  writeFileSync(image, Buffer.concat([bytes, Buffer.alloc((used + 1) * 65536 - bytes.length)]));
}

/** Take the refcount from the cluster that was allocated last. */
function zeroRefcountOfLastCluster(image: string): void {
  const { at, used, bytes } = refcountBlock(image);
  bytes.writeUInt16BE(0, at + 2 * (used - 1));
  writeFileSync(image, bytes);
}

const names = async (path: string): Promise<string[]> =>
  (JSON.parse(await done('ls', '--json', path)) as { snapshots: { name: string }[] }).snapshots.map(({ name }) => name);

describe('an image file', () => {
  it(
    'is made, and QEMU agrees',
    inDirectory(async (directory) => {
      const image = join(directory, 'a.qcow2');
      await done('create', image, '1.5G', '--cluster-size', '4K', '--lazy-refcounts', '--refcount-bits', '32');
      const seen = JSON.parse(await runOk('qemu-img', ['info', '--output=json', image]));
      expect(seen).toMatchObject({
        format: 'qcow2',
        'virtual-size': 1.5 * 2 ** 30,
        'cluster-size': 4096,
        'format-specific': { data: { compat: '1.1', 'lazy-refcounts': true, 'refcount-bits': 32 } },
      });
      const info = JSON.parse(await done('info', '--json', image));
      expect(info).toMatchObject({
        name: 'a',
        virtualSize: 1.5 * 2 ** 30,
        format: { version: 3, clusterSize: 4096, refcountBits: 32 },
        snapshots: [],
        overlays: [],
      });
    }),
  );

  it(
    'takes its size and format from its backing file',
    withImage(async ({ directory, image }) => {
      const [overlay, plain, second] = ['overlay.qcow2', 'plain.raw', 'second.qcow2'].map((name) =>
        join(directory, name),
      );
      await done('create', overlay!, '--backing', 'vm1.qcow2');
      writeFileSync(plain!, Buffer.alloc(65536, 7));
      await done('create', second!, '--backing', 'plain.raw');
      const info = JSON.parse(await done('info', '--json', overlay!));
      expect(info.virtualSize).toBe(16 * 2 ** 20);
      expect(info.chain.map((layer: { format: string }) => layer.format)).toEqual(['qcow2', 'qcow2']);
      expect(JSON.parse(await runOk('qemu-img', ['info', '--output=json', second!]))['backing-filename-format']).toBe(
        'raw',
      );
      const text = await done('info', '--chain', overlay!);
      expect(text).toContain('vm1.qcow2 (qcow2)');
      expect(text).toContain(image);
    }),
  );

  it(
    'is never overwritten',
    withImage(async ({ image }) => {
      const before = readFileSync(image);
      expect(await failed('create', image, '1G')).toContain(image);
      expect(readFileSync(image).equals(before)).toBe(true);
    }),
  );

  it(
    'has its checkpoints taken, listed, renamed, brought back and deleted',
    withImage(async ({ image }) => {
      await runOk('qemu-io', ['-c', 'write -P 1 0 1M', image]);
      await done('checkpoint', image, 'one');
      await runOk('qemu-io', ['-c', 'write -P 2 0 1M', image]);
      await done('checkpoint', image, 'with space');
      expect(await names(image)).toEqual(['one', 'with space']);
      await done('rename', image, 'with space', 'two');
      expect(await names(image)).toEqual(['one', 'two']);
      await done('rollback', image, 'one');
      await runOk('qemu-io', ['-c', 'read -P 1 0 1M', image]);
      await done('delete', image, 'one');
      expect(await names(image)).toEqual(['two']);
      expect(await done('ls', image)).toMatch(/^NAME +TAKEN .*\n├─ two +\d{4}-.*\n└─ \(live\) +now .*\n$/);
      await runOk('qemu-img', ['check', image]);
    }),
  );

  it(
    'answers for a checkpoint that is not there, or there already, in one line',
    withImage(async ({ image }) => {
      await done('checkpoint', image, 'one');
      expect(await failed('delete', image, 'two')).toContain('"two"');
      expect(await failed('rollback', image, 'two')).toContain('"two"');
      expect(await failed('checkpoint', image, 'one')).toContain('one');
      expect(await failed('checkpoint', image, 'a/b')).toContain('slash');
      expect(await names(image)).toEqual(['one']);
    }),
  );

  it(
    'grows, and shrinks only when that is said',
    withImage(async ({ image }) => {
      await done('resize', image, '32M');
      expect(JSON.parse(await done('info', '--json', image)).virtualSize).toBe(32 * 2 ** 20);
      expect(await failed('resize', image, '8M')).toContain('--shrink');
      await done('resize', '--shrink', image, '8M');
      expect(JSON.parse(await done('info', '--json', image)).virtualSize).toBe(8 * 2 ** 20);
      await runOk('qemu-img', ['check', image]);
    }),
  );

  it(
    'that is none is refused by every command, and stays as it is',
    inDirectory(async (directory) => {
      const [file, missing] = [join(directory, 'text.qcow2'), join(directory, 'missing.qcow2')];
      writeFileSync(file, 'no image at all');
      for (const command of [['info'], ['ls'], ['check']]) {
        expect(await failed(...command, file)).toContain(file);
        expect(await failed(...command, missing)).toContain(missing);
      }
      expect(await failed('checkpoint', file, 'x')).toContain(file);
      expect(readFileSync(file, 'utf8')).toBe('no image at all');
    }),
  );
});

describe('check', () => {
  it(
    'finds nothing in a good image',
    withImage(async ({ image }) => {
      expect(await done('check', image)).toContain('No errors were found');
      expect(JSON.parse(await done('check', '--json', image))).toMatchObject({ corruptions: 0, leaks: 0 });
    }),
  );

  it(
    'has status 3 for leaks alone, and 0 once they are mended',
    withImage(async ({ image }) => {
      leakCluster(image);
      expect((await vdskfs(['check', image])).status).toBe(3);
      expect((await vdskfs(['check', '--repair', 'leaks', image])).status).toBe(0);
      expect((await vdskfs(['check', image])).status).toBe(0);
      await runOk('qemu-img', ['check', image]);
    }),
  );

  it(
    'has status 2 for corruption, and 0 once it is mended',
    withImage(async ({ image }) => {
      await runOk('qemu-io', ['-c', 'write -P 1 0 64k', image]);
      zeroRefcountOfLastCluster(image);
      expect((await vdskfs(['check', image])).status).toBe(2);
      expect((await vdskfs(['check', '--repair', 'all', image])).status).toBe(0);
      await runOk('qemu-img', ['check', image]);
      await runOk('qemu-io', ['-c', 'read -P 1 0 64k', image]);
    }),
  );
});

describe('mount', () => {
  it(
    'returns when the tree answers; status knows it; unmount returns when its process is gone',
    withMountpoint(async ({ image, mountpoint }) => {
      expect(await done('mount', '--driver', driver, image, mountpoint)).toBe('');
      expect(readdirSync(mountpoint)).toContain('vm1');
      const [status] = await statuses(mountpoint);
      expect(status).toMatchObject({ state: 'serving', driver, readOnly: false, disks: [{ name: 'vm1', image }] });
      expect(await done('status', mountpoint)).toContain(mountpoint);
      expect(isAlive(status?.pid)).toBe(true);

      await done('unmount', mountpoint);
      expect(isAlive(status?.pid)).toBe(false);
      expect(await statuses(mountpoint)).toEqual([]);
      expect(readdirSync(mountpoint)).toEqual([]);
      await runOk('qemu-img', ['check', image]);
    }),
  );

  it(
    'shows every image of a folder that is not the backing file of another',
    withMountpoint(async ({ directory, mountpoint }) => {
      const folder = join(directory, 'images');
      mkdirSync(folder);
      await done('create', join(folder, 'base.qcow2'), '16M');
      await done('create', join(folder, 'top.qcow2'), '--backing', 'base.qcow2');
      await done('create', join(folder, 'other.qcow2'), '16M');
      await done('mount', '--driver', driver, folder, mountpoint);
      expect(readdirSync(mountpoint).filter((name) => name !== 'README')).toEqual(['other', 'top']);
      await done('unmount', mountpoint);
    }),
  );

  it(
    'mounts nothing when one image of several fails',
    withMountpoint(async ({ directory, image, mountpoint }) => {
      const broken = join(directory, 'broken.qcow2');
      writeFileSync(broken, 'no image');
      expect(await failed('mount', '--driver', driver, image, broken, mountpoint)).toContain(broken);
      expect(await statuses(mountpoint)).toEqual([]);
      await runOk('qemu-io', ['-c', 'write 0 64k', image]); // the good one is not locked any more
    }),
  );

  it(
    'refuses a mountpoint that is no empty directory, and says why',
    withMountpoint(async ({ directory, image, mountpoint }) => {
      const mount = (path: string) => failed('mount', '--driver', driver, image, path);
      expect(await mount(join(directory, 'missing'))).toContain('missing');
      expect(await mount(image)).toContain('must be an empty directory');
      expect(await mount(directory)).toContain('not empty');
      expect(await mount('/proc')).toContain('a mount point of type proc already');
      await withMount(image, {}, async (tree) => {
        expect(await mount(tree.mountpoint)).toContain('vdskfs has a mount there already');
        expect(await mount(tree.path('vm1', 'snapshots'))).toContain('lies inside the vdskfs mount');
      });
      expect(await statuses(mountpoint)).toEqual([]);
    }),
  );

  it(
    'of an image that is mounted already says where',
    withMountpoint(async ({ image, mountpoint }) => {
      await withMount(image, {}, async (tree) => {
        const sentence = `mounted by vdskfs (process ${tree.pid}); give its directory ${tree.path('vm1')} instead`;
        expect(await failed('mount', '--driver', driver, image, mountpoint)).toContain(sentence);
        expect(await failed('checkpoint', image, 'x')).toContain(sentence);
      });
    }),
  );

  it(
    'with --replace ends first what is mounted there',
    withMountpoint(async ({ image, mountpoint }) => {
      await done('mount', '--driver', driver, image, mountpoint);
      const [first] = await statuses(mountpoint);
      await done('mount', '--driver', driver, '--replace', '--read-only', image, mountpoint);
      const [second] = await statuses(mountpoint);
      expect(isAlive(first?.pid)).toBe(false);
      expect(second).toMatchObject({ state: 'serving', readOnly: true });
      await done('unmount', mountpoint);
    }),
  );
});

describe('a disk of a mount', () => {
  it(
    'is changed through its directory, with the same words as an image file',
    withImage(async ({ image }) => {
      await withMount(image, {}, async (tree) => {
        const disk = tree.path('vm1');
        await done('checkpoint', disk, 'one');
        await done('checkpoint', disk, 'with "space"');
        expect(await names(disk)).toEqual(['one', 'with "space"']);
        await done('rollback', disk, 'with "space"');
        await done('rename', disk, 'with "space"', 'two');
        await done('delete', disk, 'one');
        await done('resize', disk, '32M');
        expect(await names(disk)).toEqual(['two']);
        expect(JSON.parse(await done('info', '--json', disk))).toMatchObject({
          name: 'vm1',
          virtualSize: 32 * 2 ** 20,
        });
        expect(await failed('checkpoint', disk, 'two')).toContain('"two" already');
        expect(await failed('rollback', disk, 'none')).toContain('"none"');
        expect(await failed('resize', disk, '8M')).toContain('--shrink');
        await done('resize', '--shrink', disk, '8M');
      });
      expect(await names(image)).toEqual(['two']);
      await runOk('qemu-img', ['check', image]);
    }),
  );
});

describe('the end of a mount', () => {
  it.each(['SIGINT', 'SIGTERM', 'SIGHUP'] as const)('comes cleanly with %s', (signal) =>
    withImage(async ({ image, mountpoint }) => {
      const tree = await startServer([image], mountpoint, {});
      tree.signal(signal);
      expect(await tree.ended).toEqual({ status: 0, signal: null });
      expect(readdirSync(mountpoint)).toEqual([]);
      await runOk('qemu-img', ['check', image]);
    })(),
  );

  it(
    'comes cleanly with umount(8) from outside',
    withImage(async ({ image, mountpoint }) => {
      const tree = await startServer([image], mountpoint, {});
      await runOk('umount', [mountpoint]);
      expect(await tree.ended).toEqual({ status: 0, signal: null });
    }),
  );

  it(
    'comes when whoever waits for it has died',
    withImage(async ({ image, mountpoint }) => {
      const args = [launcher, 'mount', '--foreground', '--driver', driver, image, mountpoint];
      const server = spawn(process.execPath, args, { stdio: ['ignore', 'ignore', 'ignore', 'ipc'] });
      await once(server, 'message');
      server.disconnect();
      expect(await once(server, 'exit')).toEqual([0, null]);
      expect(readdirSync(mountpoint)).toEqual([]);
    }),
  );

  it(
    'waits for files that are open, and says who holds them',
    withImage(async ({ image, mountpoint }) => {
      const tree = await startServer([image], mountpoint, {});
      const fd = openSync(tree.path('vm1', 'disk.raw'), 'r+');
      try {
        expect(await failed('unmount', mountpoint)).toContain(`(pid ${process.pid})`);
        tree.signal('SIGTERM');
        await logged(tree, 'another signal cuts them off');
        expect(existsSync(tree.path('vm1'))).toBe(true);
      } finally {
        closeSync(fd);
      }
      await done('unmount', mountpoint);
      expect(await tree.ended).toEqual({ status: 0, signal: null });
    }),
  );

  it(
    'is not refused for what is open for a moment, held by nobody who can be found',
    withMountpoint(async ({ directory, image, mountpoint }) => {
      // A umount(8) that finds the mount busy three times.
      const tried = join(directory, 'tried');
      for (const program of ['umount', 'fusermount3']) {
        const real = (await runOk('sh', ['-c', `command -v ${program}`])).trim();
        const busy = `echo >>'${tried}'; [ $(wc -l <'${tried}') -gt 3 ] || { echo target is busy >&2; exit 32; }`;
        writeFileSync(join(directory, program), `#!/bin/sh\n${busy}\nexec ${real} "$@"\n`, { mode: 0o755 });
      }
      const tree = await startServer([image], mountpoint, { env: { PATH: `${directory}:${process.env.PATH}` } });
      tree.signal('SIGTERM');
      expect(await tree.ended).toEqual({ status: 0, signal: null });
      expect(readFileSync(tried, 'utf8')).toBe('\n'.repeat(4));
      expect(tree.log()).not.toContain('cannot unmount');
    }),
  );

  it(
    'is forced by a second signal, and all that was written is kept',
    withImage(async ({ image, mountpoint }) => {
      const tree = await startServer([image], mountpoint, {});
      const fd = openSync(tree.path('vm1', 'disk.raw'), 'r+');
      writeFileSync(fd, Buffer.alloc(65536, 5));
      tree.signal('SIGTERM');
      await logged(tree, 'another signal cuts them off');
      await sleep(1100); // closer together they are one wish
      tree.signal('SIGTERM');
      expect(await tree.ended).toEqual({ status: 0, signal: null });
      expect(tree.log()).toContain(`cut off node (pid ${process.pid})`);
      expect(() => writeFileSync(fd, 'more')).toThrow('ENOTCONN');
      expect(() => closeSync(fd)).toThrow('ENOTCONN'); // what its flush finds; closed it is all the same
      await runOk('qemu-img', ['check', image]);
      await runOk('qemu-io', ['-c', 'read -P 5 0 64k', image]);
    }),
  );

  it(
    'of a killed process is left to the next command, which says so',
    withMountpoint(async ({ image, mountpoint }) => {
      const tree = await startServer([image], mountpoint, {});
      tree.signal('SIGKILL');
      await tree.ended;
      expect(await statuses(mountpoint)).toMatchObject([{ state: 'stale', disks: [{ name: 'vm1', image }] }]);
      expect(await done('status')).toContain(`vdskfs unmount ${mountpoint}`);
      expect(await failed('mount', '--driver', driver, image, mountpoint)).toContain('--replace');
      await done('unmount', mountpoint);
      expect(await statuses(mountpoint)).toEqual([]);
      expect(await failed('unmount', mountpoint)).toContain('nothing is mounted there');
    }),
  );

  it(
    'of a killed process is made up for by --replace',
    withMountpoint(async ({ image, mountpoint }) => {
      const dead = await startServer([image], mountpoint, {});
      dead.signal('SIGKILL');
      await dead.ended;
      const tree = await startServer([image], mountpoint, { args: ['--replace'] });
      expect(existsSync(tree.path('vm1', 'disk.raw'))).toBe(true);
      await stop(tree);
    }),
  );
});
