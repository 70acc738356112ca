/** Compacting real images, at rest and under a guest that goes on writing, and what is left when it is killed. */
import { spawn } from 'node:child_process';
import { mkdir, rmdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as after } from 'node:timers/promises';
import { expect, it } from 'vitest';
import { driver, launcher, vdskfs, withMount } from './mount.ts';
import { runOk, withDirectory } from './run.ts';

const MiB = 2 ** 20;
const DISK_BYTES = 256 * MiB;
const DEADLINE_MS = 30_000;
/** Holes are made by fallocate(2), which fuse-native has no call for. */
const punches = driver === 'native';

interface Image {
  readonly path: string;
  /** What the disk and its snapshot hold, as raw files. */
  readonly live: string;
  readonly kept: string;
}

/**
 * A disk with a snapshot, 190 MiB in use: what a deleted snapshot held alone was the start of the file, and compressed
 * clusters have others between them.
 */
async function fragmented(directory: string, options: string): Promise<Image> {
  const path = join(directory, 'disk.qcow2');
  const qemuIo = (...commands: string[]): Promise<string> =>
    runOk('qemu-io', ['-f', 'qcow2', ...commands.flatMap((command) => ['-c', command]), path]);
  await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', options, path, String(DISK_BYTES)]);
  await qemuIo('write -q -P 1 0 120M', 'write -q -c -P 2 220M 64k', 'write -q -c -P 3 221M 128k');
  await runOk('qemu-img', ['snapshot', '-c', 'gone', path]);
  await qemuIo('write -q -P 4 0 120M', 'write -q -c -P 5 222M 1M', 'write -q -P 6 150M 30M');
  await runOk('qemu-img', ['snapshot', '-c', 'kept', path]);
  await qemuIo('write -q -P 7 20M 40M');
  await runOk('qemu-img', ['snapshot', '-d', 'gone', path]);
  const image = { path, live: join(directory, 'live.raw'), kept: join(directory, 'kept.raw') };
  await runOk('qemu-img', ['convert', '-O', 'raw', path, image.live]);
  await runOk('qemu-img', ['convert', '-O', 'raw', '-l', 'kept', path, image.kept]);
  return image;
}

const KEPT = ['-f', 'raw', '-F', 'qcow2'];

async function expectKept({ path, kept }: Image): Promise<void> {
  await runOk('qemu-img', ['check', '-q', path]);
  const found = `${path}.kept`;
  await runOk('qemu-img', ['convert', '-O', 'raw', '-l', 'kept', path, found]);
  await runOk('cmp', [kept, found]);
}

async function expectWhole(image: Image): Promise<void> {
  await expectKept(image);
  await runOk('qemu-img', ['compare', ...KEPT, image.live, image.path]);
}

const bytesOf = async (path: string): Promise<number> => (await stat(path)).size;

/** Until the file has become shorter: then the rest of the work is under way. */
async function shortening({ path }: Image, before: number): Promise<void> {
  for (const end = Date.now() + DEADLINE_MS; (await bytesOf(path)) >= before; await after(1)) {
    if (Date.now() > end) throw new Error('it does not get shorter');
  }
}

it.each(['cluster_size=64k', 'compat=0.10,cluster_size=4k'])(
  'an image at rest comes to be as short as what it holds, and the second time nothing is done: %s',
  (options) =>
    withDirectory(async (directory) => {
      const image = await fragmented(directory, options);
      const before = await bytesOf(image.path);
      expect((await vdskfs(['compact', image.path])).status).toBe(0);
      const after = await bytesOf(image.path);
      expect(before - after).toBeGreaterThan(60 * MiB);
      await expectWhole(image);
      const { mtimeMs } = await stat(image.path);
      expect(await vdskfs(['compact', image.path])).toMatchObject({ status: 0, stdout: '', stderr: '' });
      expect((await stat(image.path)).mtimeMs).toBe(mtimeMs);
    }),
);

it.runIf(punches)('while fio writes, discards and flushes, and checkpoints come and go, no block is lost', () =>
  withDirectory(async (directory) => {
    const image = await fragmented(directory, 'cluster_size=64k');
    const before = await bytesOf(image.path);
    const words = [
      '--name=writer',
      '--direct=1',
      '--ioengine=libaio',
      '--iodepth=8',
      '--rw=randwrite',
      '--bssplit=4k/50:64k/30:256k/20',
      '--offset=8m',
      '--size=40m',
      '--fsync=50',
      '--verify=crc32c',
      '--verify_fatal=1',
      '--verify_state_save=0',
      '--randrepeat=1',
    ];
    await withMount(image.path, {}, async (tree) => {
      const file = tree.path('disk', 'disk.raw');
      let writing = true;
      const written = runOk('fio', [`--filename=${file}`, ...words, '--rate=16m']).finally(() => {
        writing = false;
      });
      const compact = async (): Promise<void> => {
        for (let round = 0; writing; round++) {
          // New holes, in a part that is not fio's.
          await runOk('fallocate', ['-p', '-o', String((60 + (round % 8) * 7) * MiB), '-l', String(5 * MiB), file]);
          expect(await vdskfs(['compact', tree.path('disk')])).toMatchObject({ status: 0 });
        }
      };
      const comeAndGo = async (): Promise<void> => {
        while (writing) {
          expect(await vdskfs(['checkpoint', tree.path('disk'), 'short'])).toMatchObject({ status: 0 });
          await rmdir(tree.path('disk', 'snapshots', 'short'));
        }
      };
      await Promise.all([written, compact(), comeAndGo()]);
      expect(await vdskfs(['compact', tree.path('disk')])).toMatchObject({ status: 0 });
      await runOk('fio', [`--filename=${file}`, ...words, '--verify_only']);
      await runOk('cmp', [tree.path('disk', 'snapshots', 'kept', 'disk.raw'), image.kept]);
    });
    expect(await bytesOf(image.path)).toBeLessThan(before);
    await expectKept(image);
  }),
);

it.runIf(punches)('a mounted chain: its live image at once, at rest the layers below it, too', () =>
  withDirectory(async (directory) => {
    const image = await fragmented(directory, 'cluster_size=64k');
    const overlay = join(directory, 'point.qcow2');
    const before = await bytesOf(image.path);
    const live = join(directory, 'now.raw');
    await withMount(image.path, {}, async (tree) => {
      await mkdir(tree.path('disk', 'overlays', 'point'));
      const file = tree.path('disk', 'disk.raw');
      await runOk('dd', [
        'if=/dev/urandom',
        `of=${file}`,
        'bs=1M',
        'seek=10',
        'count=20',
        'conv=notrunc',
        'status=none',
      ]);
      await runOk('fallocate', ['-p', '-o', String(10 * MiB), '-l', String(15 * MiB), file]);
      const long = await bytesOf(overlay);
      expect(await vdskfs(['compact', tree.path('disk')])).toMatchObject({ status: 0 });
      expect(await bytesOf(overlay)).toBeLessThan(long - 12 * MiB);
      expect(await bytesOf(image.path)).toBe(before);
      await runOk('cp', [file, live]);
    });
    expect(await vdskfs(['compact', image.path])).toMatchObject({ status: 0 });
    expect(await bytesOf(image.path)).toBeLessThan(before - 60 * MiB);
    await expectWhole(image);
    await runOk('qemu-img', ['check', '-q', overlay]);
    await runOk('qemu-img', ['compare', ...KEPT, live, overlay]);
    await withMount(image.path, {}, async (tree) => {
      await runOk('cmp', [tree.path('disk', 'disk.raw'), live]);
      await runOk('cmp', [tree.path('disk', 'overlays', 'point', 'disk.raw'), image.live]);
      await runOk('cmp', [tree.path('disk', 'snapshots', 'kept', 'disk.raw'), image.kept]);
    });
  }),
);

it('kill -9 in the middle loses nothing, and the next run goes on', () =>
  withDirectory(async (directory) => {
    const image = await fragmented(directory, 'cluster_size=64k');
    const before = await bytesOf(image.path);
    await withMount(image.path, {}, async (tree) => {
      const broken = vdskfs(['compact', tree.path('disk')]);
      await shortening(image, before);
      tree.signal('SIGKILL');
      await tree.ended;
      expect((await broken).status).toBe(1);
    });
    const half = await bytesOf(image.path);
    expect(half).toBeLessThan(before);
    expect(await vdskfs(['compact', image.path])).toMatchObject({ status: 0, stderr: '' });
    expect(await bytesOf(image.path)).toBeLessThan(half);
    await expectWhole(image);
  }));

it('Ctrl-C ends it between two steps, of an image and through the kernel of a mounted disk', () =>
  withDirectory(async (directory) => {
    const image = await fragmented(directory, 'cluster_size=64k');
    const before = await bytesOf(image.path);
    const command = spawn(process.execPath, [launcher, 'compact', image.path]);
    const ended = new Promise<number | null>((resolve) => command.on('close', resolve));
    await shortening(image, before);
    command.kill('SIGINT');
    expect(await ended).toBe(1);
    const some = await bytesOf(image.path);
    await expectWhole(image);

    await withMount(image.path, {}, async (tree) => {
      const through = spawn(process.execPath, [launcher, 'compact', tree.path('disk')]);
      const gone = new Promise((resolve) => through.on('close', resolve));
      await shortening(image, some);
      through.kill('SIGINT');
      await gone;
    });
    expect(await bytesOf(image.path)).toBeLessThan(some);
    await expectWhole(image);
    expect((await vdskfs(['compact', image.path])).status).toBe(0);
    await expectWhole(image);
  }));
