/** export, diff, space, merge, rebase: on image files and on mounted disks, held against qemu-img. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync, statSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { launcher, vdskfs, withMount } from './mount.ts';
import { runOk, withDirectory } from './run.ts';

/** Run a command of vdskfs that must succeed, and print nothing on standard error. @returns its standard output */
async function done(...args: string[]): Promise<string> {
  const result = await vdskfs(args);
  expect({ args, status: result.status, stderr: result.stderr }).toEqual({ args, status: 0, stderr: '' });
  return result.stdout;
}

/** One that must fail: status 1 and one line. @returns the line, without the program's name */
async function failed(...args: string[]): Promise<string> {
  const result = await vdskfs(args);
  expect(result).toMatchObject({ status: 1, stdout: '' });
  expect(result.stderr).toMatch(/^vdskfs: [^\n]+\n$/);
  return result.stderr.slice('vdskfs: '.length, -1);
}

const qemuIo = (image: string, ...commands: string[]): Promise<string> =>
  runOk('qemu-io', ['-f', 'qcow2', ...commands.flatMap((command) => ['-c', command]), image]);

/** Both hold the same bytes; `-U`: also while a mount has one of them. */
const same = (a: string, b: string, ...options: string[]): Promise<string> =>
  runOk('qemu-img', ['compare', '-U', ...options, a, b]);

const qemuInfo = async (path: string): Promise<Record<string, unknown>> =>
  JSON.parse(await runOk('qemu-img', ['info', '-U', '--output=json', path])) as Record<string, unknown>;

interface Place {
  readonly directory: string;
  /** `path('top.qcow2')`: in the directory. */
  path(name: string): string;
}

/**
 * `base.qcow2` of 24 MiB, and `top.qcow2` of 25 MiB over it with the checkpoints `one` and `two`; data, zeros over data,
 * discarded and compressed parts.
 */
const withChain = (body: (place: Place) => Promise<void>) => () =>
  withDirectory(async (directory) => {
    const path = (name: string): string => join(directory, name);
    const [base, top] = [path('base.qcow2'), path('top.qcow2')];
    await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', base, '24M']);
    await qemuIo(base, 'write -P 1 0 3M', 'write -P 2 8M 300k', 'write -P 0 12M 1M', 'write -P 3 23M 1M');
    await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', top, '25M']);
    await qemuIo(top, 'write -P 4 1M 256k', 'write -z 2M 256k', 'write -c -P 5 16M 64k', 'write -P 6 24M 100k');
    await runOk('qemu-img', ['snapshot', '-c', 'one', top]);
    await qemuIo(top, 'write -P 7 1M 64k', 'write -P 8 4M 1M', 'discard 24M 64k');
    await runOk('qemu-img', ['snapshot', '-c', 'two', top]);
    await qemuIo(top, 'write -z 4M 512k', 'write -P 9 20M 64k');
    await body({ directory, path });
  });

/** The names of what is there. */
const listed = (directory: string): string[] => readdirSync(directory).sort();

/** Start a command of vdskfs; `begun` resolves when `directory` holds something that it did not hold before. */
function starts(directory: string, ...args: string[]): { child: ChildProcess; begun: Promise<void> } {
  const before = listed(directory).length;
  const child = spawn(process.execPath, [launcher, ...args], { stdio: ['ignore', 'pipe', 'pipe'] });
  const begun = (async () => {
    while (child.exitCode === null && listed(directory).length === before) await sleep(1);
  })();
  return { child, begun };
}

describe('export', () => {
  it(
    'gives what qemu-img convert gives: of a chain, at each checkpoint, raw, qcow2, compressed',
    withChain(async ({ directory, path }) => {
      const top = path('top.qcow2');
      for (const [name, args] of [
        ['plain.qcow2', []],
        ['zlib.qcow2', ['--compress', 'zlib']],
        ['zstd.qcow2', ['--compress', 'zstd']],
        ['plain.raw', []],
      ] as const) {
        expect(await done('export', top, path(name), ...args)).toBe('');
        await same(top, path(name));
        if (name.endsWith('.qcow2')) await runOk('qemu-img', ['check', path(name)]);
      }
      expect(statSync(path('plain.raw')).blocks * 512).toBeLessThan(8 * 2 ** 20);
      expect(statSync(path('zstd.qcow2')).size).toBeLessThan(statSync(path('plain.qcow2')).size / 4);
      expect(await qemuInfo(path('zstd.qcow2'))).toMatchObject({
        'format-specific': { data: { 'compression-type': 'zstd' } },
      });
      for (const checkpoint of ['one', 'two']) {
        await done('export', `${top}@${checkpoint}`, path(`${checkpoint}.raw`));
        await runOk('qemu-img', ['convert', '-l', checkpoint, '-O', 'raw', top, path('expected.raw')]);
        await runOk('cmp', [path(`${checkpoint}.raw`), path('expected.raw')]);
      }
      expect(listed(directory).filter((name) => name.includes('partial'))).toEqual([]);
    }),
  );

  it(
    'never touches a file that is there, and leaves nothing when it fails',
    withChain(async ({ directory, path }) => {
      const before = listed(directory);
      expect(await failed('export', path('top.qcow2'), path('base.qcow2'))).toContain('exists already');
      expect(await failed('export', path('top.qcow2'), path('top.qcow2'))).toContain('exists already');
      expect(await failed('export', `${path('top.qcow2')}@none`, path('a.raw'))).toContain('no checkpoint is named');
      expect(await failed('export', path('none.qcow2'), path('a.raw'))).toContain('no such file');
      expect(await failed('export', path('top.qcow2'), path('none/a.raw'))).toContain('cannot create');
      expect(listed(directory)).toEqual(before);
      const wrong = await vdskfs(['export', path('top.qcow2'), path('a.raw'), '--compress', 'zlib']);
      expect(wrong).toMatchObject({ status: 2, stdout: '' });
    }),
  );

  it('leaves nothing after Ctrl-C', () =>
    withDirectory(async (directory) => {
      const image = join(directory, 'large.qcow2');
      await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '1G']);
      await qemuIo(image, 'write -P 1 0 512M');
      const { child, begun } = starts(directory, 'export', image, join(directory, 'large.copy'), '--compress', 'zlib');
      let stderr = '';
      child.stderr?.on('data', (chunk: Buffer) => (stderr += chunk.toString()));
      const ended = once(child, 'close');
      await begun;
      child.kill('SIGINT');
      expect(await ended).toEqual([1, null]);
      expect(stderr).toMatch(/^vdskfs: interrupted by SIGINT: .*large.copy was not written\n$/);
      expect(listed(directory)).toEqual(['large.qcow2']);
    }));

  it(
    'of a mounted disk holds one moment, while its guest goes on writing',
    withChain(async ({ path }) => {
      await withMount(path('top.qcow2'), {}, async (tree) => {
        const disk = tree.path('top');
        await done('export', `${disk}@one`, path('one.qcow2'), '--compress', 'zlib');
        await runOk('qemu-img', ['convert', '-U', '-l', 'one', '-O', 'raw', path('top.qcow2'), path('expected.raw')]);
        await same(path('one.qcow2'), path('expected.raw'));

        await using file = await open(tree.path('top', 'disk.raw'), 'r+');
        // The guest counts up in two places; no later number may be in the first than in the second.
        let stop = false;
        const guest = (async () => {
          const block = Buffer.alloc(512);
          for (let count = 1; !stop; count++) {
            block.writeUInt32LE(count);
            await file.write(block, 0, 512, 24 * 2 ** 20);
            await file.write(block, 0, 512, 0);
          }
        })();
        await done('export', disk, path('live.raw'));
        stop = true;
        await guest;
        await using copy = await open(path('live.raw'));
        const numbers = await Promise.all([0, 24 * 2 ** 20].map((at) => copy.read(Buffer.alloc(4), 0, 4, at)));
        const [first, second] = numbers.map(({ buffer }) => buffer.readUInt32LE());
        expect(second! - first!).toBeGreaterThanOrEqual(0);
        expect(second! - first!).toBeLessThanOrEqual(1);
        expect(readdirSync(tree.path('top', 'snapshots'))).toEqual(['one', 'two']);
      });
      await runOk('qemu-img', ['check', path('top.qcow2')]);
    }),
  );

  it(
    'of a disk mounted for reading takes no checkpoint',
    withChain(async ({ path }) => {
      await withMount(path('top.qcow2'), { args: ['--read-only'] }, async (tree) => {
        await done('export', tree.path('top'), path('copy.raw'));
        await same(path('copy.raw'), path('top.qcow2'));
        expect(existsSync(tree.path('top', 'snapshots', 'one'))).toBe(true);
      });
    }),
  );
});
