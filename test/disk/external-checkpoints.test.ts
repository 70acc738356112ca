/** What the commands make of external checkpoints: differences across layers, the space they take, merging them. */
import { existsSync, readdirSync, realpathSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import type { Checkpoint, Disk } from '../../src/disk/disk.ts';
import { mergeOverlay } from '../../src/disk/merge.ts';
import { openDisk } from '../../src/disk/open-disk.ts';
import { createImage } from '../../src/qcow2/create.ts';
import { newFolder, qemuImg } from './chain-files.ts';

const CLUSTER = 65536;
const SIZE = 64 * CLUSTER;

const write = (disk: Disk, cluster: number, count: number, byte: number): void => {
  using opened = disk.openLive();
  const bytes = new Uint8Array(count * CLUSTER).fill(byte);
  expect(opened.contents.write(bytes, 0, bytes.length, cluster * CLUSTER)).toBe(true);
};

const readAll = (disk: Disk, checkpoint?: Checkpoint): Buffer => {
  using opened = checkpoint === undefined ? disk.openLive() : disk.openCheckpoint(checkpoint);
  const bytes = Buffer.alloc(SIZE);
  opened.contents.read(bytes, 0, SIZE, 0);
  return bytes;
};

const named = (disk: Disk, name: string): Checkpoint => disk.checkpoints().find((one) => one.name === name)!;

/** `vm.qcow2`, internal `a`, overlay `b`, overlay `c` with an internal `d` in it. */
async function makeDisk(): Promise<{ disk: Disk; folder: string; image: string }> {
  const folder = realpathSync(newFolder());
  const image = join(folder, 'vm.qcow2');
  createImage(image, { size: SIZE });
  const disk = await openDisk(image, { readOnly: false });
  write(disk, 0, 16, 1);
  await disk.takeCheckpoint('a');
  write(disk, 20, 2, 2);
  await disk.takeCheckpoint('b', { kind: 'external' });
  write(disk, 4, 4, 3);
  write(disk, 40, 8, 4);
  await disk.takeCheckpoint('c', { kind: 'external' });
  write(disk, 44, 8, 5);
  await disk.takeCheckpoint('d');
  {
    using opened = disk.openLive();
    expect(opened.contents.discard(0, 2 * CLUSTER)).toBe(true);
  }
  return { disk, folder, image };
}

const clustersOf = async (disk: Disk, from: string, to: string | undefined): Promise<unknown> =>
  (await disk.differences(named(disk, from), to === undefined ? undefined : named(disk, to))).map(
    ({ offset, length, kind }) => [offset / CLUSTER, length / CLUSTER, kind],
  );

it('differences go across layers, and between both kinds', async () => {
  const { disk } = await makeDisk();
  expect(await clustersOf(disk, 'a', 'b')).toEqual([[20, 2, 'data']]);
  expect(await clustersOf(disk, 'b', 'c')).toEqual([
    [4, 4, 'data'],
    [40, 8, 'data'],
  ]);
  expect(await clustersOf(disk, 'c', 'd')).toEqual([[44, 8, 'data']]);
  expect(await clustersOf(disk, 'd', 'a')).toEqual([
    [4, 4, 'data'],
    [20, 2, 'zero'],
    [40, 12, 'zero'],
  ]);
  expect(await clustersOf(disk, 'd', undefined)).toEqual([[0, 2, 'zero']]);
  await disk.close();
});

it('what an overlay hides is what its checkpoint has to itself, and what its merge gives back', async () => {
  const { disk, folder, image } = await makeDisk();
  // It lies in an overlay, which could not be merged.
  await disk.deleteCheckpoint(named(disk, 'd'));
  const { checkpoints } = await disk.space();
  const space = new Map(checkpoints.map(({ checkpoint, ...bytes }) => [checkpoint.name, bytes]));
  // c hides half of what b's overlay wrote at 40, 4 of 8 clusters; b's overlay hides 4 clusters of the image.
  expect(space.get('b')).toMatchObject({ own: 4 * CLUSTER, shared: 14 * CLUSTER });
  expect(space.get('c')).toMatchObject({ own: 4 * CLUSTER, shared: 22 * CLUSTER });
  await disk.close();
  const hostBytes = (): number =>
    readdirSync(folder).reduce((sum, name) => sum + statSync(join(folder, name)).blocks * 512, 0);
  const before = hostBytes();
  const again = await openDisk(image, { readOnly: false });
  await again.deleteCheckpoint(named(again, 'c'));
  await again.close();
  expect(Math.abs(before - hostBytes() - space.get('c')!.freed)).toBeLessThanOrEqual(3 * CLUSTER);
});

it.each([
  ['one step', undefined, ['a', 'b']],
  ['to the bottom', 'vm.qcow2', ['a']],
] as const)(
  'a merge of an overlay that is a checkpoint, %s, leaves all others as they were',
  async (_name, base, left) => {
    const { disk, folder, image } = await makeDisk();
    await disk.deleteCheckpoint(named(disk, 'd'));
    const contents = new Map(disk.checkpoints().map((one) => [one.name, readAll(disk, one)]));
    const live = readAll(disk);
    const top = named(disk, 'c').id;
    await disk.close();
    const into = base === undefined ? undefined : join(folder, base);
    const merged = await mergeOverlay(top, { into });
    expect(merged.base).toBe(into ?? join(folder, 'b.qcow2'));
    expect(existsSync(top)).toBe(false);
    const again = await openDisk(image, { readOnly: false });
    expect(readAll(again).equals(live)).toBe(true);
    expect(
      again
        .checkpoints()
        .map(({ name }) => name)
        .sort(),
    ).toEqual([...left].sort());
    for (const one of again.checkpoints()) expect(readAll(again, one).equals(contents.get(one.name)!)).toBe(true);
    await again.close();
    for (const name of readdirSync(folder)) qemuImg('check', '-q', join(folder, name));
  },
);
