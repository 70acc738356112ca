/** Deleting, renaming and rolling back to external checkpoints. */
import { existsSync, readdirSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { createImage } from '../../src/qcow2/create.ts';
import { OverlayDisk, qemuCheck, qemuDigest } from './overlay-disk.ts';

const K = 1024;

async function errorOf(work: Promise<unknown>): Promise<FsError> {
  try {
    await work;
  } catch (error) {
    if (error instanceof FsError) return error;
    throw error;
  }
  throw new Error('it did not fail');
}

/** A disk with the external checkpoints a, b and c, `sizes` bytes written before each, and before the live end. */
async function chainOf(sizes: readonly number[]): Promise<OverlayDisk & { states: Map<string, string> }> {
  const test = Object.assign(new OverlayDisk(), { states: new Map<string, string>() });
  await test.open();
  for (const [index, bytes] of sizes.entries()) {
    test.write(index + 1, index * 8 * K, bytes);
    const name = 'abcdefg'[index] as string;
    if (index === sizes.length - 1) break;
    test.states.set(name, test.live());
    await test.take(name);
  }
  return test;
}

/** Everything is as it was, but for the checkpoints that are gone; also after a remount, and to QEMU. */
async function expectKept(test: OverlayDisk & { states: Map<string, string> }, live: string, names: string[]) {
  const look = (): void => {
    expect(test.live()).toBe(live);
    expect(test.overlays).toEqual(names);
    for (const name of names) expect(test.contents(name), name).toBe(test.states.get(name));
  };
  look();
  await test.open();
  look();
  const top = test.at(test.chain[0] as string);
  await test.close();
  expect(qemuDigest(top)).toBe(live);
  for (const file of test.files) if (file.endsWith('.qcow2')) qemuCheck(test.at(file));
}

describe('deleting an external checkpoint', () => {
  const [small, big] = [20 * K, 300 * K];
  it.each([
    ['a', [big, small, small, small]],
    ['a', [small, big, small, small]],
    ['b', [small, big, small, small]],
    ['b', [small, small, big, small]],
    ['c', [small, small, big, small]],
    ['c', [small, small, small, big]],
  ])('merges %s, of layers with %j bytes', async (name, sizes) => {
    await using test = await chainOf(sizes);
    const live = test.live();
    await test.disk.deleteCheckpoint(test.checkpoint(name));
    const left = ['a', 'b', 'c'].filter((other) => other !== name);
    expect(test.files.filter((file) => file.endsWith('.qcow2'))).toEqual([
      ...left.map((n) => `${n}.qcow2`),
      'vm1.qcow2',
    ]);
    await expectKept(test, live, left);
  });

  it('leads back to one image when all are deleted, in any order', async () => {
    for (const order of ['abc', 'cba', 'bac', 'bca']) {
      await using test = await chainOf([small, big, small, big]);
      const live = test.live();
      const left = new Set(['a', 'b', 'c']);
      for (const name of order) {
        await test.disk.deleteCheckpoint(test.checkpoint(name));
        left.delete(name);
      }
      expect(test.files).toEqual(['vm1.qcow2']);
      test.write(9, 0, 5);
      test.write(1, 0, 5);
      await expectKept(test, live, []);
    }
  });

  it('keeps a size that changed since', async () => {
    await using test = await chainOf([small, small]);
    await test.disk.resize(2 ** 21, { shrink: false });
    test.write(7, 2 ** 21 - K, K);
    await test.take('b');
    test.states.set('b', test.live());
    await test.disk.resize(2 ** 19, { shrink: true });
    const live = test.live();
    await test.disk.deleteCheckpoint(test.checkpoint('a'));
    await expectKept(test, live, ['b']);
    await test.open();
    await test.disk.deleteCheckpoint(test.checkpoint('b'));
    await expectKept(test, live, []);
  });

  it('is refused while a file of it is open, or where internal checkpoints would be lost, or others depend on it', async () => {
    await using test = await chainOf([small, small, small]);
    {
      using _open = test.disk.openCheckpoint(test.checkpoint('a'));
      expect((await errorOf(test.disk.deleteCheckpoint(test.checkpoint('a')))).errno).toBe('EBUSY');
    }
    await test.disk.takeCheckpoint('inner');
    const held = await errorOf(test.disk.deleteCheckpoint(test.checkpoint('b')));
    expect(held.errno).toBe('EBUSY');
    expect(held.message).toContain("'inner'");
    createImage(test.at('other.qcow2'), { backing: { file: 'a.qcow2', format: 'qcow2' } });
    const needed = await errorOf(test.disk.deleteCheckpoint(test.checkpoint('a')));
    expect(needed.errno).toBe('EBUSY');
    expect(needed.message).toContain('other.qcow2');
  });

  it.each(['down', 'up'])('can be broken off and goes on later, moving data %s', async (direction) => {
    await using test = Object.assign(new OverlayDisk(2 ** 24), { states: new Map<string, string>() });
    await test.open();
    test.write(1, 0, direction === 'up' ? 5 * 2 ** 20 : 2 ** 23);
    await test.take('a');
    test.write(2, 2 ** 22, direction === 'down' ? 5 * 2 ** 20 : 2 ** 23);
    test.states.set('b', test.live());
    await test.take('b');
    test.write(3, 2 ** 23, 100 * K);
    const live = test.live();
    const broken = test.disk.deleteCheckpoint(test.checkpoint('a'), { signal: abortedAt(test, 0.2) });
    expect((await errorOf(broken)).errno).toBe('EINTR');
    expect(test.live()).toBe(live);
    expect((await errorOf((async () => test.contents('a'))())).errno).toBe('EBUSY');
    await test.open();
    expect(test.overlays).toEqual(['a', 'b']);
    expect(test.live()).toBe(live);
    expect(test.contents('b')).toBe(test.states.get('b'));
    await test.disk.deleteCheckpoint(test.checkpoint('a'));
    await expectKept(test, live, ['b']);
    expect(test.files).toEqual(['b.qcow2', 'vm1.qcow2']);
  });

  it('with discard makes the disk what it was', async () => {
    await using test = await chainOf([small, big, small]);
    const changes: string[] = [];
    test.disk.onChange((change) => changes.push(change));
    await test.disk.deleteCheckpoint(test.checkpoint('a'), { discard: true });
    expect(changes).toContain('contents');
    expect(test.files).toEqual(['vm1.qcow2']);
    await expectKept(test, test.states.get('a') as string, []);
  });

  it('keeps views of other checkpoints going', async () => {
    await using test = await chainOf([big, small, small, small]);
    using view = test.disk.openCheckpoint(test.checkpoint('c'));
    const before = Buffer.alloc(view.contents.size());
    view.contents.read(before, 0, before.length, 0);
    await test.disk.deleteCheckpoint(test.checkpoint('a'));
    await test.disk.deleteCheckpoint(test.checkpoint('b'));
    const after = Buffer.alloc(before.length);
    view.contents.read(after, 0, after.length, 0);
    expect(before.equals(after)).toBe(true);
  });
});

/** Aborts when the operation has come that far. */
function abortedAt(test: OverlayDisk, progress: number): AbortSignal {
  const controller = new AbortController();
  const look = (): void => {
    if ((test.disk.operation()?.progress ?? 0) >= progress) controller.abort();
    else setImmediate(look).unref();
  };
  setImmediate(look).unref();
  return controller.signal;
}

describe('renaming an external checkpoint', () => {
  it('renames its file and mends the link of the one above', async () => {
    await using test = await chainOf([10 * K, 20 * K, 30 * K]);
    const live = test.live();
    const a = test.checkpoint('a');
    const renamed = await test.disk.renameCheckpoint(a, 'x');
    expect(renamed).toMatchObject({ name: 'x', id: test.at('x.qcow2'), createdMs: a.createdMs });
    test.states.set('x', test.states.get('a') as string);
    await test.disk.renameCheckpoint(test.checkpoint('b'), 'vm1');
    test.states.set('vm1', test.states.get('b') as string);
    expect(test.files).toEqual(['vm1.qcow2', 'vm1~vm1.qcow2', 'x.qcow2']);
    await expectKept(test, live, ['x', 'vm1']);
  });

  it('is refused for a name that is taken, or when others depend on the file', async () => {
    await using test = await chainOf([K, K, K]);
    expect((await errorOf(test.disk.renameCheckpoint(test.checkpoint('a'), 'b'))).errno).toBe('EEXIST');
    createImage(test.at('other.qcow2'), { backing: { file: 'a.qcow2', format: 'qcow2' } });
    expect((await errorOf(test.disk.renameCheckpoint(test.checkpoint('a'), 'x'))).errno).toBe('EBUSY');
    await test.disk.renameCheckpoint(test.checkpoint('b'), 'x');
  });
});

describe('rolling back to an external checkpoint', () => {
  it('goes on over it, and keeps what the disk held', async () => {
    await using test = await chainOf([10 * K, 20 * K, 30 * K]);
    const before = test.live();
    await test.disk.rollback(test.checkpoint('a'));
    expect(test.live()).toBe(test.states.get('a'));
    test.states.set('before-rollback', before);
    await expectKept(test, test.states.get('a') as string, ['a', 'b', 'before-rollback']);
    await test.open();
    test.write(8, 0, 4 * K);
    const branch = test.live();
    await test.disk.rollback(test.checkpoint('before-rollback'));
    expect(test.live()).toBe(before);
    test.states.set('before-rollback-2', branch);
    await expectKept(test, before, ['a', 'b', 'before-rollback', 'before-rollback-2']);
  });

  it('leaves nothing behind that nobody can see, once all are deleted', async () => {
    for (const order of [
      ['a', 'b', 'before-rollback'],
      ['before-rollback', 'b', 'a'],
      ['b', 'before-rollback', 'a'],
    ]) {
      await using test = await chainOf([10 * K, 20 * K, 30 * K]);
      await test.disk.rollback(test.checkpoint('b'));
      test.write(8, 0, 4 * K);
      const live = test.live();
      for (const name of order) {
        await test.disk.deleteCheckpoint(test.checkpoint(name));
        expect(test.live()).toBe(live);
        await test.open();
        expect(test.live()).toBe(live);
      }
      expect(readdirSync(test.folder)).toEqual(['vm1.qcow2']);
      expect(existsSync(test.at('vm1.qcow2'))).toBe(true);
      await expectKept(test, live, []);
    }
  });
});
