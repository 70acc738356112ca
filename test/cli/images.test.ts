import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { diskName, disksToMount } from '../../src/cli/images.ts';
import { openDisk } from '../../src/disk/open-disk.ts';
import { createImage } from '../../src/qcow2/create.ts';

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'vdskfs-images-'));
});
afterEach(() => rmSync(directory, { recursive: true }));

const at = (...names: string[]): string => join(directory, ...names);
const image = (name: string, backing?: string): string => {
  createImage(at(name), {
    size: 65536,
    ...(backing === undefined ? {} : { backing: { file: backing, format: 'qcow2' as const } }),
  });
  return at(name);
};

/** Their images. */
const imagesToMount = async (paths: string[]): Promise<string[]> =>
  (await disksToMount(paths)).map(({ image }) => image);
const namesIn = async (folder: string): Promise<string[]> =>
  (await imagesToMount([folder])).map((path) => basename(path));

describe('the images of a mount', () => {
  it('are the files given, in their order', async () => {
    const [b, a] = [image('b.qcow2'), image('a.qcow2')];
    expect(await imagesToMount([b, a])).toEqual([b, a]);
  });

  it('are all *.qcow2 of a folder, sorted', async () => {
    image('b.qcow2');
    image('a.qcow2');
    writeFileSync(at('notes.txt'), 'x');
    mkdirSync(at('folder.qcow2'));
    expect(await namesIn(directory)).toEqual(['a.qcow2', 'b.qcow2']);
  });

  it('are the top of each chain in a folder only', async () => {
    image('base.qcow2');
    image('middle.qcow2', 'base.qcow2');
    image('top.qcow2', at('middle.qcow2'));
    image('other.qcow2', 'file:base.qcow2');
    expect(await namesIn(directory)).toEqual(['other.qcow2', 'top.qcow2']);
  });

  it('are told apart by where a link leads, too', async () => {
    image('base.qcow2');
    symlinkSync(at('base.qcow2'), at('link'));
    image('top.qcow2', 'link');
    expect(await namesIn(directory)).toEqual(['top.qcow2']);
  });

  it('include a file of a folder that is no image: opening it will say what is wrong with it', async () => {
    writeFileSync(at('broken.qcow2'), 'not an image');
    image('good.qcow2');
    expect(await namesIn(directory)).toEqual(['broken.qcow2', 'good.qcow2']);
  });

  it('are all files of a folder where each is the backing file of another', async () => {
    writeFileSync(at('b.qcow2'), '');
    image('a.qcow2');
    rmSync(at('b.qcow2'));
    image('b.qcow2', 'a.qcow2');
    rmSync(at('a.qcow2'));
    image('a.qcow2', 'b.qcow2');
    expect(await namesIn(directory)).toEqual(['a.qcow2', 'b.qcow2']);
  });

  it('count an overlay and what it was made over as one disk', async () => {
    const base = image('vm1.qcow2');
    const disk = await openDisk(base, { readOnly: false });
    await disk.takeCheckpoint('first', { kind: 'external' });
    await disk.close();
    image('a.qcow2');
    expect(await disksToMount([directory])).toEqual([
      { image: at('a.qcow2'), name: 'a' },
      { image: base, name: 'vm1' },
    ]);
    expect(await disksToMount([at('first.qcow2'), base])).toEqual([{ image: at('first.qcow2'), name: 'vm1' }]);
  });

  it('include a disk with a clone of one of its checkpoints, which is another disk', async () => {
    const path = image('vm1.qcow2');
    const disk = await openDisk(path, { readOnly: false });
    await disk.takeCheckpoint('point', { kind: 'external' });
    await disk.takeCheckpoint('later', { kind: 'external' });
    await disk.close();
    image('clone.qcow2', 'vm1.qcow2');
    image('second.qcow2', 'point.qcow2');
    expect((await namesIn(directory)).sort()).toEqual(['clone.qcow2', 'second.qcow2', 'vm1.qcow2']);
    // This one stands on what the disk writes.
    image('third.qcow2', 'later.qcow2');
    expect((await namesIn(directory)).sort()).toEqual(['clone.qcow2', 'second.qcow2', 'third.qcow2']);
  });

  it('are refused when two would be the same disk, naming both', async () => {
    mkdirSync(at('other'));
    const [one, two] = [image('vm1.qcow2'), image('other/vm1.qcow2')];
    await expect(imagesToMount([one, two])).rejects.toThrow(`${one} and ${two}: both would be the disk vm1`);
  });

  it('are refused when one is given twice', async () => {
    const path = image('vm1.qcow2');
    await expect(imagesToMount([path, path])).rejects.toThrow(`${path}: given twice`);
  });

  it('are refused when one is missing', async () => {
    await expect(imagesToMount([at('missing.qcow2')])).rejects.toThrow(/missing\.qcow2.*ENOENT/);
  });

  it('are refused when a folder holds none', async () => {
    await expect(imagesToMount([directory])).rejects.toThrow(`${directory}: holds no *.qcow2 file`);
  });
});

it.each([
  ['/a/vm1.qcow2', 'vm1'],
  ['vm1.img', 'vm1.img'],
  ['/a/vm.1.qcow2', 'vm.1'],
])('the disk of %s is %s', (path, name) => {
  expect(diskName(path)).toBe(name);
});
