/** Chains of real files for tests of what changes them, and a process that dies at one of its file operations. */
import { execFileSync } from 'node:child_process';
import { copyFileSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, vi } from 'vitest';
import { openBacking } from '../../src/disk/open-chain.ts';
import { FsError } from '../../src/errors.ts';
import { HostFile } from '../../src/storage/host-file.ts';
import { Died } from '../storage/recorder.ts';

export const qemuImg = (...args: readonly string[]): string =>
  execFileSync('qemu-img', args, { encoding: 'utf8', stdio: 'pipe' });

export const qemuIo = (image: string, ...commands: readonly string[]): string =>
  execFileSync('qemu-io', ['-f', 'qcow2', ...commands.flatMap((command) => ['-c', command]), image], {
    encoding: 'utf8',
    stdio: 'pipe',
  });

/** All that the image shows, by qemu-img. */
export function bytesByQemu(image: string): Buffer {
  const copy = join(newFolder(), 'copy.raw');
  qemuImg('convert', '-O', 'raw', image, copy);
  return readFileSync(copy);
}

/** All that the image shows, by our own engine: quicker. */
export async function bytesOf(image: string): Promise<Buffer> {
  const top = await openBacking(image, 2 ** 20);
  try {
    const bytes = Buffer.alloc(top.backing.size());
    top.backing.read(bytes, 0, bytes.length, 0);
    return bytes;
  } finally {
    for (const layer of top.chain) layer[Symbol.dispose]();
  }
}

/** Paths of all files that the image is made of, top first. */
export async function chainOf(image: string): Promise<string[]> {
  const { chain } = await openBacking(image, 2 ** 20);
  for (const layer of chain) layer[Symbol.dispose]();
  return chain.map(({ path }) => path);
}

let root: string | undefined;
let folders = 0;
afterAll(() => {
  if (root !== undefined) rmSync(root, { recursive: true });
});

/** A fresh folder, removed in the end. */
export function newFolder(): string {
  root ??= mkdtempSync(join(tmpdir(), `vdskfs-chains-${process.pid}-`));
  const folder = join(root, String(folders++));
  mkdirSync(folder);
  return folder;
}

/** Options of qemu-img for each file of a chain. */
export type ChainOptions = Readonly<Partial<Record<'base' | 'mid' | 'top' | 'other', string>>>;

const made = new Map<string, string>();

/**
 * Files in a folder of their own: `base` of 3 MiB, `mid` of 2.5 MiB over it, `top` of 3.5 MiB over that; and `other` of
 * 5 MiB, which stands on nothing, as qcow2 and, with other contents, as raw.
 */
export function makeChain(options: ChainOptions = {}) {
  const key = JSON.stringify(options);
  let origin = made.get(key);
  if (origin === undefined) made.set(key, (origin = buildChain(options)));
  return copyChain(origin);
}

/** @param names which of its files; left out: all */
export function copyChain(from: string, names: readonly string[] = readdirSync(from)) {
  const folder = newFolder();
  for (const name of names) copyFileSync(join(from, name), join(folder, name));
  const path = (name: string): string => join(folder, name);
  return { folder, path, base: path('base.qcow2'), mid: path('mid.qcow2'), top: path('top.qcow2') };
}

function buildChain(options: ChainOptions): string {
  const folder = newFolder();
  const create = (name: keyof ChainOptions, size: string, backing: string | undefined, ...commands: string[]): void => {
    const image = join(folder, `${name}.qcow2`);
    const given = options[name] === undefined ? [] : ['-o', options[name] as string];
    const over = backing === undefined ? [] : ['-b', backing, '-F', 'qcow2'];
    qemuImg('create', '-q', '-f', 'qcow2', ...given, ...over, image, size);
    qemuIo(image, ...commands);
  };
  create('base', '3M', undefined, 'write -P 1 0 1M', 'write -P 2 2500k 300k');
  create('mid', '2560k', 'base.qcow2', 'write -P 3 200k 100k', 'write -z 512k 64k', 'write -P 4 1500k 200k');
  create(
    'top',
    '3584k',
    'mid.qcow2',
    'write -P 5 300k 10k',
    'write -P 6 3400k 100k',
    'discard 0 64k',
    'write -z 64k 64k',
  );
  create('other', '5M', undefined, 'write -P 1 0 200k', 'write -P 77 600k 500k', 'write -P 78 2600k 2000k');
  qemuImg('convert', '-O', 'raw', join(folder, 'base.qcow2'), join(folder, 'other.raw'));
  return folder;
}

const CHANGES = ['write', 'flush', 'truncate', 'punch'] as const;

/** Run `action` on a host whose disk is full from the write number `at` on. @returns what it threw */
export async function fullFrom(at: number, action: () => Promise<unknown>): Promise<unknown> {
  let writes = 0;
  const real = HostFile.prototype.write;
  const spy = vi.spyOn(HostFile.prototype, 'write').mockImplementation(function (this: HostFile, ...args) {
    if (writes++ >= at) throw new FsError('ENOSPC', 'no space left on the host');
    real.apply(this, args);
  });
  try {
    await action();
    return undefined;
  } catch (error) {
    return error;
  } finally {
    spy.mockRestore();
  }
}

/** Run `action` without flushing anything. */
export const unflushed = (action: () => Promise<unknown>): Promise<unknown> =>
  dyingAt(Number.POSITIVE_INFINITY, action);

/**
 * Run `action` with the change number `at` of any file, and all that follow, dying as the process would. What was written
 * is there then, flushed or not: nothing is flushed, which takes time.
 * @returns whether it came to that
 */
export async function dyingAt(at: number, action: () => Promise<unknown>): Promise<boolean> {
  let changes = 0;
  const spies = CHANGES.map((name) => {
    const real = HostFile.prototype[name] as (...args: unknown[]) => unknown;
    return vi.spyOn(HostFile.prototype, name).mockImplementation(function (this: HostFile, ...args: unknown[]) {
      if (changes++ >= at) throw new Died('the process has died');
      return (name === 'flush' ? undefined : real.apply(this, args)) as never;
    });
  });
  try {
    await action();
  } catch (error) {
    if (changes <= at) throw error;
  } finally {
    for (const spy of spies) spy.mockRestore();
  }
  return changes > at;
}
