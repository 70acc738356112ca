/** export, diff, space, merge, rebase: on image files and on mounted disks, held against qemu-img. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync, statSync } from 'node:fs';
import { open, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { driver, launcher, vdskfs, withMount } from './mount.ts';
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

/**
 * Run a command of vdskfs, and send it SIGINT as soon as `begun` says so. It must end with status 1 and one line.
 * @returns the line, without the program's name
 */
async function interrupted(begun: () => boolean, ...args: string[]): Promise<string> {
  const child = spawn(process.execPath, [launcher, ...args], { stdio: ['ignore', 'pipe', 'pipe'] });
  let stderr = '';
  child.stderr.on('data', (chunk: Buffer) => (stderr += chunk.toString()));
  const ended = once(child, 'close');
  while (child.exitCode === null && !begun()) await sleep(1);
  child.kill('SIGINT');
  expect(await ended).toEqual([1, null]);
  expect(stderr).toMatch(/^vdskfs: interrupted by SIGINT: [^\n]+\n$/);
  return stderr.slice('vdskfs: '.length, -1);
}

const hostBytes = (path: string): number => statSync(path).blocks * 512;

/** What needs no mount is the same with either driver. */
const ofImages = driver === 'native' ? it : () => {};

describe('export', () => {
  ofImages(
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

  ofImages(
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

  ofImages('leaves nothing after Ctrl-C', () =>
    withDirectory(async (directory) => {
      const image = join(directory, 'large.qcow2');
      await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '1G']);
      await qemuIo(image, 'write -P 1 0 192M');
      const begun = (): boolean => listed(directory).length > 1;
      const copy = join(directory, 'large.copy');
      expect(await interrupted(begun, 'export', image, copy, '--compress', 'zlib')).toContain('was not written');
      expect(listed(directory)).toEqual(['large.qcow2']);
    }),
  );

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
        try {
          await done('export', disk, path('live.raw'));
        } finally {
          stop = true;
          await guest;
        }
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

  it('of a mounted disk, ended by Ctrl-C, leaves neither file nor checkpoint', () =>
    withDirectory(async (directory) => {
      const image = join(directory, 'vm.qcow2');
      await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '256M']);
      await qemuIo(image, 'write -P 1 0 192M');
      await withMount(image, {}, async (tree) => {
        const begun = (): boolean => listed(directory).length > 1 && listed(tree.path('vm', 'snapshots')).length > 0;
        await interrupted(begun, 'export', tree.path('vm'), join(directory, 'copy.qcow2'), '--compress', 'zlib');
        expect(listed(directory)).toEqual(['vm.qcow2']);
        expect(listed(tree.path('vm', 'snapshots'))).toEqual([]);
      });
      await runOk('qemu-img', ['check', image]);
    }));

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

  ofImages(
    'with --since holds what changed, over a file with the earlier checkpoint',
    withChain(async ({ path }) => {
      const top = path('top.qcow2');
      await done('export', `${top}@one`, path('monday.qcow2'));
      await done('export', `${top}@two`, path('tuesday.qcow2'), '--since', 'one');
      await done('export', top, path('now.qcow2'), '--since', 'two', '--compress', 'zlib');
      await runOk('qemu-img', ['convert', '-l', 'two', '-O', 'raw', top, path('expected.raw')]);
      await same(path('tuesday.qcow2'), path('expected.raw'));
      await same(path('now.qcow2'), top);
      expect(await qemuInfo(path('now.qcow2'))).toMatchObject({
        'backing-filename': 'tuesday.qcow2',
        'backing-filename-format': 'qcow2',
      });
      expect(hostBytes(path('tuesday.qcow2'))).toBeLessThan(2 * 2 ** 20);
      for (const name of ['tuesday.qcow2', 'now.qcow2']) await runOk('qemu-img', ['check', path(name)]);

      // One that says nothing of where it came from is compared; one that is not there is named, to be made later.
      expect(await failed('export', top, path('a.qcow2'), '--since', 'one', '--backing', 'tuesday.qcow2')).toContain(
        'does not hold the checkpoint "one"',
      );
      await runOk('qemu-img', ['convert', '-l', 'one', '-O', 'raw', top, path('foreign.raw')]);
      await done('export', top, path('b.qcow2'), '--since', 'one', '--backing', 'foreign.raw');
      await same(path('b.qcow2'), top);
      await runOk('rm', [path('monday.qcow2')]);
      expect(await done('export', top, path('c.qcow2'), '--since', 'one')).toContain('one.qcow2, which is still to be');
      await done('export', `${top}@one`, path('one.qcow2'));
      await same(path('c.qcow2'), top);
    }),
  );
});

interface Extent {
  readonly offset: number;
  readonly length: number;
  readonly kind: 'data' | 'zero';
}

/** Where two raw files differ, by clusters of 64 KiB. */
async function changedClusters(a: string, b: string): Promise<Set<number>> {
  const [first, second] = await Promise.all([readFile(a), readFile(b)]);
  const clusters = new Set<number>();
  for (let at = 0; at < Math.max(first.length, second.length); at += 65536) {
    if (!first.subarray(at, at + 65536).equals(second.subarray(at, at + 65536))) clusters.add(at / 65536);
  }
  return clusters;
}

describe('diff and space', () => {
  it(
    'tell what changed and what a delete frees, of an image and of a mounted disk alike',
    withChain(async ({ path }) => {
      const top = path('top.qcow2');
      const raws = ['one', 'two'].map((name) => path(`${name}.raw`)) as [string, string];
      for (const [index, name] of ['one', 'two'].entries()) {
        await runOk('qemu-img', ['convert', '-l', name, '-O', 'raw', top, raws[index]!]);
      }
      const diff = JSON.parse(await done('diff', top, 'one', 'two', '--json'));
      const told = new Set(
        (diff.extents as Extent[]).flatMap(({ offset, length }) =>
          Array.from({ length: Math.ceil(length / 65536) }, (_, index) => offset / 65536 + index),
        ),
      );
      expect(told).toEqual(await changedClusters(...raws));
      expect(diff).toMatchObject({ from: 'one', to: 'two', changed: told.size * 65536 });
      expect(await done('diff', top, 'two', 'two')).toBe('nothing changed\n');
      expect(await done('diff', top, 'two')).toContain('zeros now');
      expect(await failed('diff', top, 'none')).toContain('no checkpoint is named "none"');

      const space = JSON.parse(await done('space', top, '--json'));
      await withMount(top, {}, async (tree) => {
        expect(JSON.parse(await done('diff', tree.path('top'), 'one', 'two', '--json'))).toEqual(diff);
        expect(JSON.parse(await done('space', tree.path('top'), '--json'))).toEqual(space);
        expect(await failed('diff', tree.path('top'), 'none')).toContain('has no checkpoint "none"');
        await done('export', `${tree.path('top')}@one`, path('one.qcow2'));
        await done('export', tree.path('top'), path('thin.qcow2'), '--since', 'one');
        expect(readdirSync(tree.path('top', 'snapshots'))).toEqual(['one', 'two']);
      });
      await same(path('thin.qcow2'), top);

      for (const { name, freed, own } of space.checkpoints as { name: string; freed: number; own: number }[]) {
        const copy = path(`copy-${name}.qcow2`);
        await runOk('cp', ['--sparse=always', top, copy]);
        const before = hostBytes(copy);
        await done('delete', copy, name);
        await runOk('qemu-img', ['check', copy]);
        // The snapshot table moves to another cluster, of which not all may be allocated.
        expect(Math.abs(before - hostBytes(copy) - freed)).toBeLessThanOrEqual(2 * 65536);
        expect(own).toBeGreaterThan(0);
        const left = JSON.parse(await done('space', copy, '--json'));
        expect(left.checkpoints).toHaveLength(1);
      }
    }),
  );
});

describe.runIf(driver === 'native')('ls', () => {
  it(
    'draws the checkpoints with their own size',
    withChain(async ({ path }) => {
      const lines = (await done('ls', path('top.qcow2'))).split('\n');
      expect(lines.map((line) => line.slice(0, 9).trimEnd())).toEqual(['NAME', '├─ one', '├─ two', '└─ (live)', '']);
      const json = JSON.parse(await done('ls', path('top.qcow2'), '--json'));
      expect(json.tree).toEqual([
        { name: 'one', kind: 'internal', branch: [] },
        { name: 'two', kind: 'internal', branch: [] },
        { name: null, kind: 'live', branch: [] },
      ]);
      expect(json.snapshots[0].ownSize).toBeGreaterThan(0);
      expect(await done('info', '--chain', path('top.qcow2'))).toContain('base.qcow2');
    }),
  );
});

/** `lower.qcow2` and, over it, `upper.qcow2` with 128 MiB of data of its own. */
const withLarge = (body: (place: Place & { lower: string; upper: string }) => Promise<void>) => () =>
  withDirectory(async (directory) => {
    const path = (name: string): string => join(directory, name);
    const [lower, upper] = [path('lower.qcow2'), path('upper.qcow2')];
    await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', lower, '160M']);
    await qemuIo(lower, 'write -P 1 0 128M');
    await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', 'lower.qcow2', '-F', 'qcow2', upper]);
    await qemuIo(upper, 'write -P 2 32M 128M');
    await body({ directory, path, lower, upper });
  });

describe('merge and rebase', () => {
  ofImages(
    'give what qemu-img commit and rebase give',
    withChain(async ({ path }) => {
      for (const name of ['one', 'two']) await runOk('qemu-img', ['snapshot', '-d', name, path('top.qcow2')]);
      for (const name of ['base', 'top']) await runOk('cp', [path(`${name}.qcow2`), path(`q-${name}.qcow2`)]);
      await runOk('qemu-img', ['rebase', '-u', '-b', 'q-base.qcow2', '-F', 'qcow2', path('q-top.qcow2')]);
      await runOk('qemu-img', ['commit', '-q', path('q-top.qcow2')]);
      await runOk('qemu-img', ['convert', '-O', 'raw', path('top.qcow2'), path('before.raw')]);
      expect(await done('merge', path('top.qcow2'))).toBe('');
      for (const name of ['base', 'top']) {
        await same(path(`${name}.qcow2`), path(`q-${name}.qcow2`));
        await runOk('qemu-img', ['check', path(`${name}.qcow2`)]);
      }
      expect(await done('rebase', path('top.qcow2'), '--backing', '')).toBe('');
      await same(path('top.qcow2'), path('before.raw'));
      expect(await qemuInfo(path('top.qcow2'))).not.toHaveProperty('backing-filename');
      await done('rebase', path('top.qcow2'), '--backing', 'q-base.qcow2');
      await same(path('top.qcow2'), path('before.raw'));
    }),
  );

  it(
    'are refused on a mount, and on images of one',
    withChain(async ({ path }) => {
      await withMount(path('top.qcow2'), {}, async (tree) => {
        for (const args of [['merge'], ['rebase', '--backing', '']]) {
          expect(await failed(...args, tree.path('top'))).toContain('unmount it');
          expect(await failed(...args, path('top.qcow2'))).toContain('mounted by vdskfs');
        }
      });
    }),
  );

  ofImages(
    'broken off by Ctrl-C, leave a correct image, and go on',
    withLarge(async ({ path, lower, upper }) => {
      await runOk('qemu-img', ['convert', '-O', 'raw', upper, path('before.raw')]);
      const whole = async (): Promise<void> => {
        await same(upper, path('before.raw'));
        for (const image of [lower, upper]) await runOk('qemu-img', ['check', image]);
      };
      const upperBytes = hostBytes(upper);
      const copied = (): boolean => hostBytes(upper) > upperBytes + 4 * 2 ** 20;
      expect(await interrupted(copied, 'rebase', upper, '--backing', '')).toContain('with the same contents');
      await whole();
      expect(await qemuInfo(upper)).toHaveProperty('backing-filename');

      const lowerBytes = hostBytes(lower);
      const committed = (): boolean => hostBytes(lower) > lowerBytes + 4 * 2 ** 20;
      expect(await interrupted(committed, 'merge', upper)).toContain('the same command goes on');
      await whole();
      await done('merge', upper);
      await whole();
      await same(lower, path('before.raw'));
      await done('rebase', upper, '--backing', '');
      await whole();
    }),
  );
});
