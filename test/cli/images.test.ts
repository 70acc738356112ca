import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { diskName, imagesToMount } from '../../src/cli/images.ts';
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

describe('the images of a mount', () => {
  it('are the files given, in their order', () => {
    const [b, a] = [image('b.qcow2'), image('a.qcow2')];
    expect(imagesToMount([b, a])).toEqual([b, a]);
  });

  it('are all *.qcow2 of a folder, sorted', () => {
    image('b.qcow2');
    image('a.qcow2');
    writeFileSync(at('notes.txt'), 'x');
    mkdirSync(at('folder.qcow2'));
    expect(imagesToMount([directory]).map((path) => basename(path))).toEqual(['a.qcow2', 'b.qcow2']);
  });

  it('are the top of each chain in a folder only', () => {
    image('base.qcow2');
    image('middle.qcow2', 'base.qcow2');
    image('top.qcow2', at('middle.qcow2'));
    image('other.qcow2', 'file:base.qcow2');
    expect(imagesToMount([directory]).map((path) => basename(path))).toEqual(['other.qcow2', 'top.qcow2']);
  });

  it('are told apart by where a link leads, too', () => {
    image('base.qcow2');
    symlinkSync(at('base.qcow2'), at('link'));
    image('top.qcow2', 'link');
    expect(imagesToMount([directory]).map((path) => basename(path))).toEqual(['top.qcow2']);
  });

  it('include a file of a folder that is no image: opening it will say what is wrong with it', () => {
    writeFileSync(at('broken.qcow2'), 'not an image');
    image('good.qcow2');
    expect(imagesToMount([directory]).map((path) => basename(path))).toEqual(['broken.qcow2', 'good.qcow2']);
  });

  it('are all files of a folder where each is the backing file of another', () => {
    writeFileSync(at('b.qcow2'), '');
    image('a.qcow2');
    rmSync(at('b.qcow2'));
    image('b.qcow2', 'a.qcow2');
    rmSync(at('a.qcow2'));
    image('a.qcow2', 'b.qcow2');
    expect(imagesToMount([directory]).map((path) => basename(path))).toEqual(['a.qcow2', 'b.qcow2']);
  });

  it('are refused when two would be the same disk, naming both', () => {
    mkdirSync(at('other'));
    const [one, two] = [image('vm1.qcow2'), image('other/vm1.qcow2')];
    expect(() => imagesToMount([one, two])).toThrow(`${one} and ${two}: both would be the disk vm1`);
  });

  it('are refused when one is given twice', () => {
    const path = image('vm1.qcow2');
    expect(() => imagesToMount([path, path])).toThrow(`${path}: given twice`);
  });

  it('are refused when one is missing', () => {
    expect(() => imagesToMount([at('missing.qcow2')])).toThrow(/missing\.qcow2.*ENOENT/);
  });

  it('are refused when a folder holds none', () => {
    expect(() => imagesToMount([directory])).toThrow(`${directory}: holds no *.qcow2 file`);
  });
});

it.each([
  ['/a/vm1.qcow2', 'vm1'],
  ['vm1.img', 'vm1.img'],
  ['/a/vm.1.qcow2', 'vm.1'],
])('the disk of %s is %s', (path, name) => {
  expect(diskName(path)).toBe(name);
});
