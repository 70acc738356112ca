import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { createImage } from '../../src/qcow2/create.ts';
import { digest, OverlayDisk, qemuCheck, qemuDigest } from './overlay-disk.ts';

const K = 1024;

const errnoOf = async (work: Promise<unknown>): Promise<string> => {
  try {
    await work;
  } catch (error) {
    if (error instanceof FsError) return error.errno;
    throw error;
  }
  return 'none';
};

describe('an external checkpoint', () => {
  it('freezes the image and goes on in NAME.qcow2', async () => {
    await using test = new OverlayDisk();
    await test.open();
    test.write(1, 0, 100 * K);
    const before = test.live();
    const taken = await test.take('first');
    expect(taken).toMatchObject({ kind: 'external', name: 'first', id: test.at('first.qcow2'), layer: 'vm1.qcow2' });
    expect(test.live()).toEqual(before);
    test.write(2, 50 * K, 100 * K);
    const after = test.live();
    expect(test.contents('first')).toEqual(before);
    expect(test.chain).toEqual(['first.qcow2', 'vm1.qcow2']);
    await test.close();
    expect(qemuDigest(test.image)).toEqual(before);
    expect(qemuDigest(test.at('first.qcow2'))).toEqual(after);
    qemuCheck(test.image);
    qemuCheck(test.at('first.qcow2'));
    const info = JSON.parse(
      execFileSync('qemu-img', ['info', '--output=json', test.at('first.qcow2')], { encoding: 'utf8' }),
    );
    expect(info['backing-filename']).toBe('vm1.qcow2');
    expect(info['backing-filename-format']).toBe('qcow2');
  });

  it.each(['vm1.qcow2', 'first.qcow2', 'second.qcow2'])('is found again, given %s', async (given) => {
    await using test = new OverlayDisk();
    await test.open();
    const states: string[] = [];
    for (const [index, name] of ['first', 'second'].entries()) {
      test.write(index + 1, index * 20 * K, 30 * K);
      states.push(test.live());
      await test.take(name);
    }
    test.write(9, 10 * K, 5 * K);
    const live = test.live();
    const listed = test.disk.checkpoints();
    const disk = await test.open(test.at(given));
    expect(disk.name).toBe('vm1');
    expect(disk.readOnly).toBeUndefined();
    expect(disk.checkpoints()).toEqual(listed);
    expect(test.live()).toEqual(live);
    expect(test.contents('first')).toEqual(states[0]);
    expect(test.contents('second')).toEqual(states[1]);
    test.write(3, 0, 4 * K);
    expect(test.contents('second')).toEqual(states[1]);
  });

  it('lets a view that is open go on', async () => {
    await using test = new OverlayDisk();
    await test.open();
    using live = test.disk.openLive();
    const shared = live.shared;
    await test.take('first');
    expect(live.shared).not.toBe(shared);
    expect(live.shared.id).toBe(shared.id);
    expect(live.contents.write(new Uint8Array(10).fill(7), 0, 10, 5)).toBe(true);
    const read = new Uint8Array(12);
    live.contents.read(read, 0, 12, 4);
    expect([...read]).toEqual([0, ...new Array(10).fill(7), 0]);
    expect(test.contents('first')).toBe(digest(new Uint8Array(test.bytes)));
  });

  it('never overwrites a file: where the name is taken it is DISK~NAME.qcow2', async () => {
    await using test = new OverlayDisk();
    writeFileSync(test.at('first.qcow2'), 'mine');
    writeFileSync(test.at('second.qcow2.state'), 'mine too');
    await test.open();
    await test.take('first');
    await test.take('second');
    expect(test.overlays).toEqual(['first', 'second']);
    expect(test.chain).toEqual(['vm1~second.qcow2', 'vm1~first.qcow2', 'vm1.qcow2']);
    expect(readFileSync(test.at('first.qcow2'), 'utf8')).toBe('mine');
    await test.open();
    expect(test.overlays).toEqual(['first', 'second']);
  });

  it('has a name that is a file name with all that comes behind it', async () => {
    await using test = new OverlayDisk();
    await test.open();
    expect(await errnoOf(test.take('x'.repeat(239)))).toBe('ENAMETOOLONG');
    expect(await errnoOf(test.take('a/b'))).toBe('EINVAL');
    await test.take('x'.repeat(238));
    expect(await errnoOf(test.take('x'.repeat(238)))).toBe('EEXIST');
  });

  it('goes where the folder of overlays is, which the image remembers', async () => {
    await using test = new OverlayDisk();
    mkdirSync(test.at('elsewhere'));
    await test.open(test.image, { overlayFolder: test.at('elsewhere') });
    test.write(1, 0, 10);
    await test.take('first');
    test.write(2, 0, 10);
    await test.take('second');
    const live = test.live();
    expect(test.chain).toEqual(['elsewhere/second.qcow2', 'elsewhere/first.qcow2', 'vm1.qcow2']);
    await test.open();
    expect(test.live()).toEqual(live);
    expect(test.overlays).toEqual(['first', 'second']);
    await test.close();
    execFileSync('mv', [test.at('elsewhere'), test.at('hidden')]);
    const disk = await test.open();
    expect(disk.readOnly).toMatch(/it goes on in .*elsewhere\/first\.qcow2, which is not there/);
    // Wherever it is now: once its folder was given it is remembered.
    const found = await test.open(test.image, { overlayFolder: test.at('hidden') });
    expect(found.readOnly).toBeUndefined();
    expect(test.live()).toEqual(live);
    await test.open();
    expect(test.disk.readOnly).toBeUndefined();
    expect(test.overlays).toEqual(['first', 'second']);
  });

  it('makes no chain that could not be opened again', async () => {
    await using test = new OverlayDisk();
    let top = 'vm1.qcow2';
    for (let depth = 1; depth < 200; depth++) {
      const above = `layer${depth}.qcow2`;
      createImage(test.at(above), { clusterBytes: 4096, backing: { file: top, format: 'qcow2' } });
      top = above;
    }
    await test.open(test.at(top));
    await test.take('last');
    expect(await errnoOf(test.take('more'))).toBe('ENOSPC');
    expect(test.files).not.toContain('more.qcow2');
    await test.open(test.at(top));
    expect(test.disk.readOnly).toBeUndefined();
    expect(test.overlays).toEqual(['last']);
  });

  it('leaves an image alone that others have built on', async () => {
    await using test = new OverlayDisk();
    createImage(test.at('other.qcow2'), { backing: { file: 'vm1.qcow2', format: 'qcow2' } });
    const disk = await test.open();
    expect(disk.readOnly).toContain(test.at('other.qcow2'));
    expect(await errnoOf(test.take('first'))).toBe('EBUSY');
    await test.open(test.at('other.qcow2'));
    expect(test.disk.name).toBe('other');
    await test.take('first');
    expect(test.chain).toEqual(['first.qcow2', 'other.qcow2', 'vm1.qcow2']);
  });

  it('keeps internal snapshots of every layer readable', async () => {
    await using test = new OverlayDisk();
    await test.open();
    test.write(1, 0, 50 * K);
    const inner = test.live();
    await test.disk.takeCheckpoint('inside');
    test.write(2, 0, 50 * K);
    await test.take('first');
    test.write(3, 0, 50 * K);
    await test.disk.takeCheckpoint('above');
    const above = test.live();
    test.write(4, 0, 50 * K);
    await test.open();
    expect(test.disk.checkpoints().map(({ name, layer }) => [name, layer])).toEqual([
      ['inside', 'vm1.qcow2'],
      ['above', 'first.qcow2'],
      ['first', 'vm1.qcow2'],
    ]);
    expect(test.contents('inside')).toEqual(inner);
    expect(test.contents('above')).toEqual(above);
    expect(await errnoOf(test.disk.deleteCheckpoint(test.checkpoint('inside')))).toBe('ENOTSUP');
    expect(await errnoOf(test.disk.rollback(test.checkpoint('inside')))).toBe('ENOTSUP');
    await test.disk.rollback(test.checkpoint('above'));
    expect(test.live()).toEqual(above);
  });
});
