/** Rebasing: the contents stay, whatever the new backing file has, also when the process dies at a file operation. */
import { rmSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { rebaseImage } from '../../src/disk/rebase.ts';
import {
  bytesByQemu,
  bytesOf,
  type ChainOptions,
  copyChain,
  dyingAt,
  makeChain,
  qemuImg,
  qemuIo,
  unflushed,
} from './chain-files.ts';

const info = (image: string): Record<string, unknown> => JSON.parse(qemuImg('info', '--output=json', image));

describe.each<[string, ChainOptions]>([
  ['64 KiB clusters', {}],
  ['version 2', { top: 'compat=0.10' }],
  ['subclusters', { top: 'extended_l2=on,cluster_size=128k', base: 'cluster_size=512' }],
  ['clusters of 2 MiB', { top: 'cluster_size=2M', mid: 'cluster_size=4096' }],
])('%s: the contents stay over', (_name, options) => {
  it.each([
    ['the file below the present one', 'base.qcow2', 'qcow2'],
    ['an unrelated image', 'other.qcow2', 'qcow2'],
    ['a raw file', 'other.raw', 'raw'],
    ['nothing', undefined, undefined],
    ['the same file', 'mid.qcow2', 'qcow2'],
  ])('%s', async (_what, backing, format) => {
    const { top } = makeChain(options);
    const before = await bytesOf(top);
    await rebaseImage(top, backing);
    expect(bytesByQemu(top).equals(before)).toBe(true);
    expect(info(top)['backing-filename']).toBe(backing);
    expect(info(top)['backing-filename-format']).toBe(format);
    // And from there to another one.
    await rebaseImage(top, 'other.qcow2');
    expect((await bytesOf(top)).equals(before)).toBe(true);
    qemuImg('check', '-q', top);
  });
});

it('copies no more than differs', async () => {
  const { top, path } = makeChain();
  qemuImg('convert', '-O', 'qcow2', path('mid.qcow2'), path('same.qcow2'));
  qemuIo(path('same.qcow2'), 'write -P 99 1M 64k');
  const size = (): number => Number(/Image end offset: (\d+)/.exec(qemuImg('check', top))?.[1]);
  const before = size();
  await rebaseImage(top, 'same.qcow2');
  expect(size() - before).toBeLessThanOrEqual(65536);
});

describe('refused, with nothing changed:', () => {
  it.each<[string, (paths: ReturnType<typeof makeChain>) => Promise<unknown>, string, string]>([
    ['itself', ({ top }) => rebaseImage(top, 'top.qcow2'), 'EINVAL', 'made of the image itself'],
    ['what stands on it', ({ mid }) => rebaseImage(mid, 'top.qcow2'), 'EINVAL', 'made of the image itself'],
    ['what is not there', ({ top }) => rebaseImage(top, 'none.qcow2'), 'ENOENT', 'none.qcow2'],
    [
      'checkpoints that show the backing file',
      ({ top }) => {
        qemuImg('snapshot', '-c', 'kept', top);
        return rebaseImage(top, 'base.qcow2');
      },
      'EBUSY',
      '"kept"',
    ],
  ])('%s', async (_name, action, errno, words) => {
    const paths = makeChain();
    const before = await bytesOf(paths.top);
    await expect(action(paths)).rejects.toMatchObject({ errno, message: expect.stringContaining(words) });
    expect((await bytesOf(paths.top)).equals(before)).toBe(true);
    expect(info(paths.top)['backing-filename']).toBe('mid.qcow2');
  });
});

it('broken off, the image stands where it stood', async () => {
  const { top } = makeChain();
  const before = await bytesOf(top);
  const controller = new AbortController();
  const progress = (): void => controller.abort(new Error('enough'));
  await expect(rebaseImage(top, undefined, { progress, signal: controller.signal })).rejects.toThrow('enough');
  expect((await bytesOf(top)).equals(before)).toBe(true);
  expect(info(top)['backing-filename']).toBe('mid.qcow2');
});

it.each([
  ['another image', 'other.qcow2'],
  ['a raw file', 'other.raw'],
  ['nothing', undefined],
])('a death at any file operation, on the way to %s, changes no byte', { timeout: 60_000 }, async (_what, backing) => {
  const origin = makeChain();
  const before = await bytesOf(origin.top);
  const files = ['base.qcow2', 'mid.qcow2', 'top.qcow2', ...(backing === undefined ? [] : [backing])];
  for (let at = 0; ; at++) {
    const { top, folder } = copyChain(origin.folder, files);
    const died = await dyingAt(at, () => rebaseImage(top, backing));
    if (!(await bytesOf(top)).equals(before)) throw new Error(`it has changed after a death at operation ${at}`);
    if (!died) break;
    await unflushed(() => rebaseImage(top, backing));
    if (!(await bytesOf(top)).equals(before)) throw new Error(`after a death at operation ${at} it went wrong`);
    if (at % 8 === 0) qemuImg('check', '-q', top);
    rmSync(folder, { recursive: true });
  }
});
