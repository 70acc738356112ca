/** Commit and pull against qemu-img's own: the same bytes, the same sizes, compressed clusters among them. */
import { execFileSync } from 'node:child_process';
import { copyFileSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { commitAll, finishCommit, prepareCommit } from '../../src/qcow2/commit-down.ts';
import { imageTarget, rawTarget } from '../../src/qcow2/commit-target.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import type { Backing, Image } from '../../src/qcow2/image.ts';
import { imageBacking, rawBacking } from '../../src/qcow2/layer.ts';
import { closeImage } from '../../src/qcow2/open-image.ts';
import { inSteps } from '../../src/qcow2/steps.ts';
import { HostFile } from '../../src/storage/host-file.ts';
import { openSession } from './model.ts';

const run = (command: string, ...args: string[]): string =>
  execFileSync(command, args, { encoding: 'utf8', stdio: 'pipe' });

interface Case {
  readonly name: string;
  readonly lower: { readonly format: 'raw' | 'qcow2'; readonly options?: string; readonly size: string };
  readonly upper: { readonly options: string; readonly size: string };
}

const cases: readonly Case[] = [
  { name: 'equal', lower: { format: 'qcow2', size: '2M' }, upper: { options: 'cluster_size=64k', size: '2M' } },
  {
    name: 'a longer upper, smaller clusters',
    lower: { format: 'qcow2', options: 'cluster_size=64k', size: '1M' },
    upper: { options: 'cluster_size=4k', size: '2M' },
  },
  {
    name: 'a shorter upper, larger clusters',
    lower: { format: 'qcow2', options: 'cluster_size=4k', size: '2M' },
    upper: { options: 'cluster_size=64k', size: '1M' },
  },
  {
    name: 'subclusters into version 2',
    lower: { format: 'qcow2', options: 'compat=0.10,cluster_size=16k', size: '2M' },
    upper: { options: 'extended_l2=on,cluster_size=64k', size: '2M' },
  },
  { name: 'raw', lower: { format: 'raw', size: '2M' }, upper: { options: 'cluster_size=64k', size: '2M' } },
  {
    name: 'a longer upper over raw',
    lower: { format: 'raw', size: '1M' },
    upper: { options: 'cluster_size=4k', size: '2M' },
  },
];

let folder = '';
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'vdskfs-commit-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

/** The two files, and a copy of the lower one, in a folder of their own. */
function make({ lower, upper }: Case): { lower: string; upper: string } {
  const directory = mkdtempSync(join(folder, 'case-'));
  const paths = { lower: join(directory, 'lower'), upper: join(directory, 'upper.qcow2') };
  run(
    'qemu-img',
    'create',
    '-q',
    '-f',
    lower.format,
    ...(lower.options ? ['-o', lower.options] : []),
    paths.lower,
    lower.size,
  );
  run('qemu-io', '-f', lower.format, '-c', 'write -P 1 100k 300k', '-c', 'write -P 2 700k 300k', paths.lower);
  run(
    'qemu-img',
    'create',
    '-q',
    '-f',
    'qcow2',
    '-o',
    upper.options,
    '-b',
    paths.lower,
    '-F',
    lower.format,
    paths.upper,
    upper.size,
  );
  const clusters = /compat=0.10|extended/.test(upper.options) ? [] : ['-c', 'write -c -P 5 512k 64k'];
  run(
    'qemu-io',
    '-f',
    'qcow2',
    '-c',
    'write -P 3 123k 70k',
    '-c',
    'write -z 256k 128k',
    ...clusters,
    '-c',
    'write -P 4 900k 30k',
    paths.upper,
  );
  return paths;
}

async function commit(paths: { lower: string; upper: string }, format: 'raw' | 'qcow2'): Promise<void> {
  using lowerFile = HostFile.open(paths.lower, { readOnly: false });
  using upperFile = HostFile.open(paths.upper, { readOnly: true });
  const lower: Image | undefined = format === 'raw' ? undefined : openSession(lowerFile).image;
  const backing: Backing = lower === undefined ? rawBacking(lowerFile) : imageBacking(lower);
  expect(readHeader(upperFile).backingFile).toBe(paths.lower);
  const { image } = openSession(upperFile, upperFile, backing);
  const target = lower === undefined ? rawTarget(lowerFile) : imageTarget(lower);
  await prepareCommit(image, target);
  await inSteps(commitAll(image, target));
  await finishCommit(image, target, { shrink: false });
  if (lower !== undefined) closeImage(lower);
}

describe('as qemu-img commit does', () => {
  it.each(cases)('$name', async (one) => {
    const { format } = one.lower;
    const paths = make(one);
    const theirs = `${paths.lower}.theirs`;
    const before = `${paths.lower}.before`;
    copyFileSync(paths.lower, before);
    run('qemu-img', 'commit', '-q', '-d', paths.upper);
    copyFileSync(paths.lower, theirs);
    copyFileSync(before, paths.lower);
    await commit(paths, format);
    const sizeOf = (path: string): number =>
      JSON.parse(run('qemu-img', 'info', '--output=json', '-f', format, path))['virtual-size'];
    expect(sizeOf(paths.lower)).toBe(sizeOf(theirs));
    run('qemu-img', 'compare', '-f', format, '-F', format, paths.lower, theirs);
    if (format === 'qcow2') run('qemu-img', 'check', paths.lower);
  });
});
