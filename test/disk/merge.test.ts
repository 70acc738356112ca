/** Merging an overlay: the bytes of qemu-img commit, guards, and a death at each file operation. */
import { existsSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { mergeOverlay } from '../../src/disk/merge.ts';
import { FsError } from '../../src/errors.ts';
import {
  bytesByQemu,
  bytesOf,
  type ChainOptions,
  chainOf,
  copyChain,
  dyingAt,
  fullFrom,
  makeChain,
  newFolder,
  qemuImg,
  qemuIo,
  unflushed,
} from './chain-files.ts';

const chains: [string, ChainOptions][] = [
  ['64 KiB clusters', {}],
  ['version 2 below', { base: 'compat=0.10,cluster_size=4096' }],
  ['subclusters above smaller clusters', { mid: 'cluster_size=4096', top: 'extended_l2=on,cluster_size=128k' }],
];

describe.each(chains)('a merge, %s', (_name, options) => {
  it('one step down gives the bytes of qemu-img commit; the overlay shows what it did', async () => {
    const { top, mid } = makeChain(options);
    const expected = makeChain(options);
    qemuImg('commit', '-q', expected.top);
    const before = await bytesOf(top);
    expect(await mergeOverlay(top, {})).toEqual({ base: mid, removed: [] });
    expect(bytesByQemu(mid).equals(await bytesOf(expected.mid))).toBe(true);
    expect(bytesByQemu(top).equals(before)).toBe(true);
    for (const image of [top, mid]) qemuImg('check', '-q', image);
    expect(qemuImg('map', '--output=json', top)).not.toContain('top.qcow2');
  });

  it('to the bottom gives the bytes of qemu-img commit -b; what was between is gone', async () => {
    const { top, mid, base } = makeChain(options);
    const expected = makeChain(options);
    qemuImg('commit', '-q', '-b', 'base.qcow2', expected.top);
    const before = await bytesOf(top);
    expect(await mergeOverlay(top, { into: base })).toEqual({ base, removed: [mid] });
    expect(bytesByQemu(base).equals(await bytesOf(expected.base))).toBe(true);
    expect(bytesByQemu(top).equals(before)).toBe(true);
    expect(existsSync(mid)).toBe(false);
    for (const image of [top, base]) qemuImg('check', '-q', image);
    expect(JSON.parse(qemuImg('info', '--output=json', top))).toMatchObject({
      'backing-filename': 'base.qcow2',
      'backing-filename-format': 'qcow2',
    });
  });
});

it('a merge into a raw file', async () => {
  const { path } = makeChain();
  qemuImg('create', '-q', '-f', 'qcow2', '-b', 'other.raw', '-F', 'raw', path('over.qcow2'), '4M');
  qemuIo(path('over.qcow2'), 'write -P 9 100k 100k', 'write -z 0 64k', 'write -P 8 3900k 10k');
  const before = await bytesOf(path('over.qcow2'));
  await mergeOverlay(path('over.qcow2'), {});
  expect((await bytesOf(path('over.qcow2'))).equals(before)).toBe(true);
  qemuImg('compare', '-f', 'raw', '-F', 'qcow2', path('other.raw'), path('over.qcow2'));
});

describe('refused, with nothing changed:', () => {
  it.each<[string, (files: ReturnType<typeof makeChain>) => Promise<unknown>, string, string]>([
    ['no backing file', ({ base }) => mergeOverlay(base, {}), 'EINVAL', 'stands on no other file'],
    [
      'a base that is not below',
      ({ top, path }) => mergeOverlay(top, { into: path('other.qcow2') }),
      'EINVAL',
      'is none of the files',
    ],
    ['a base that is not there', ({ top }) => mergeOverlay(top, { into: 'none.qcow2' }), 'ENOENT', 'no such file'],
    ['another overlay over the base', ({ mid }) => mergeOverlay(mid, {}), 'EBUSY', 'over.qcow2'],
    ['another overlay over the bottom', ({ top, base }) => mergeOverlay(top, { into: base }), 'EBUSY', 'over.qcow2'],
    [
      'checkpoints of the overlay',
      ({ top }) => {
        qemuImg('snapshot', '-c', 'kept', top);
        return mergeOverlay(top, {});
      },
      'EBUSY',
      '"kept"',
    ],
    [
      'checkpoints of a file between',
      ({ top, mid, base, path }) => {
        rmSync(path('over.qcow2'));
        qemuImg('snapshot', '-c', 'kept', mid);
        return mergeOverlay(top, { into: base });
      },
      'EBUSY',
      '"kept"',
    ],
    [
      'a dependent in another folder, if that is named',
      ({ top, mid }) => {
        const folder = newFolder();
        qemuImg('create', '-q', '-f', 'qcow2', '-b', mid, '-F', 'qcow2', join(folder, 'elsewhere.qcow2'));
        return mergeOverlay(top, { backingRoots: [folder] });
      },
      'EBUSY',
      'elsewhere.qcow2',
    ],
  ])('%s', async (_name, action, errno, words) => {
    const files = makeChain();
    qemuImg('create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', files.path('over.qcow2'));
    const all = [files.base, files.mid, files.top];
    const before = await Promise.all(all.map(bytesOf));
    await expect(action(files)).rejects.toMatchObject({ errno, message: expect.stringContaining(words) });
    const after = await Promise.all(all.map(bytesOf));
    expect(after.every((bytes, index) => bytes.equals(before[index]!))).toBe(true);
  });
});

it('broken off, the overlay shows what it did, and the same merge goes on', async () => {
  const { top, base } = makeChain();
  const before = await bytesOf(top);
  const controller = new AbortController();
  const progress = (): void => controller.abort(new Error('enough'));
  await expect(mergeOverlay(top, { into: base }, { progress, signal: controller.signal })).rejects.toThrow('enough');
  expect((await bytesOf(top)).equals(before)).toBe(true);
  await mergeOverlay(top, { into: base });
  expect((await bytesOf(top)).equals(before)).toBe(true);
  expect((await bytesOf(base)).equals(before)).toBe(true);
});

it('a full disk changes nothing that the overlay shows, and costs no cluster', async () => {
  const origin = makeChain();
  const before = await bytesOf(origin.top);
  for (let at = 0; ; at += 7) {
    const { top, base, folder } = copyChain(origin.folder, ['base.qcow2', 'mid.qcow2', 'top.qcow2']);
    const error = await fullFrom(at, () => mergeOverlay(top, { into: base }));
    expect((await bytesOf(top)).equals(before)).toBe(true);
    if (error === undefined) break;
    expect(error).toBeInstanceOf(FsError);
    await mergeOverlay(top, { into: (await chainOf(top)).at(-1) });
    expect((await bytesOf(base)).equals(before)).toBe(true);
    for (const image of [top, base]) qemuImg('check', '-q', image);
    rmSync(folder, { recursive: true });
  }
});

it('a death at any file operation leaves the overlay as it was, and the merge goes on', {
  timeout: 60_000,
}, async () => {
  const origin = makeChain();
  const before = await bytesOf(origin.top);
  for (let at = 0; ; at++) {
    const { top, mid, base, folder } = copyChain(origin.folder, ['base.qcow2', 'mid.qcow2', 'top.qcow2']);
    const died = await dyingAt(at, () => mergeOverlay(top, { into: base }));
    const same = async (image: string, what: string): Promise<void> => {
      if (!(await bytesOf(image)).equals(before)) throw new Error(`${what}, after a death at operation ${at}`);
    };
    await same(top, 'the overlay has changed');
    if (!died) break;
    // What the switched header has left over is no part of the chain any more.
    if ((await chainOf(top)).length === 2) rmSync(mid, { force: true });
    await unflushed(() => mergeOverlay(top, { into: base }));
    await same(top, 'the merge went wrong');
    await same(base, 'the base is not what the overlay is');
    if (at % 8 === 0) for (const image of [top, base]) qemuImg('check', '-q', image);
    rmSync(folder, { recursive: true });
  }
});
