/** External checkpoints with the tools that users have: mkdir, rmdir, mv, cmp, qemu-img; writers go on, servers die. */
import { createHash } from 'node:crypto';
import { closeSync, openSync, readFileSync, writeSync } from 'node:fs';
import { mkdir, readdir, readFile, rename, rmdir, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setImmediate as giveWay } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { type MountedTree, startServer, vdskfs, withMount } from './mount.ts';
import { runOk, withDirectory } from './run.ts';

const MIB = 2 ** 20;

const errno = (code: string) => expect.objectContaining({ code });

const digestOf = (path: string): string => createHash('sha1').update(readFileSync(path)).digest('hex');

/** Fill a range of disk.raw with one byte, without truncating it. */
function fill(tree: MountedTree, byte: number, offset: number, length: number): void {
  const fd = openSync(tree.path('vm1', 'disk.raw'), 'r+');
  try {
    writeSync(fd, new Uint8Array(length).fill(byte), 0, length, offset);
  } finally {
    closeSync(fd);
  }
}

async function control(tree: MountedTree, command: string): Promise<string> {
  await writeFile(tree.path('vm1', 'control'), `${command}\n`, { flag: 'r+' });
  return readFile(tree.path('vm1', 'control'), 'utf8');
}

async function withImage(body: (directory: string, image: string) => Promise<void>): Promise<void> {
  await withDirectory(async (directory) => {
    await mkdir(join(directory, 'images'));
    const image = join(directory, 'images', 'vm1.qcow2');
    await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M']);
    await body(directory, image);
  });
}

/** Writes stamps to its own part of disk.raw until it is stopped; what was acknowledged must be there. */
class Writer {
  readonly #fd: number;
  readonly #stamps = new Map<number, number>();
  readonly #done: Promise<void>;
  #stopped = false;
  #count = 0;

  constructor(tree: MountedTree) {
    this.#fd = openSync(tree.path('vm1', 'disk.raw'), 'r+');
    this.#done = this.#run();
  }

  async #run(): Promise<void> {
    const block = new Uint32Array(1024);
    while (!this.#stopped) {
      const index = (this.#count * 7919) % 2048;
      block.fill(++this.#count);
      try {
        writeSync(this.#fd, new Uint8Array(block.buffer), 0, 4096, 32 * MIB + index * 4096);
      } catch (error) {
        if (this.#stopped) return;
        throw error;
      }
      this.#stamps.set(index, this.#count);
      await giveWay();
    }
  }

  /** Writes since it began. */
  get count(): number {
    return this.#count;
  }

  async stop(): Promise<void> {
    this.#stopped = true;
    await this.#done.finally(() => closeSync(this.#fd));
  }

  check(bytes: Buffer): void {
    for (const [index, stamp] of this.#stamps) {
      const at = 32 * MIB + index * 4096;
      expect([bytes.readUInt32LE(at), bytes.readUInt32LE(at + 4092)], `block ${index}`).toEqual([stamp, stamp]);
    }
  }
}

describe('overlays', () => {
  it('are taken, listed, renamed, rolled back to and merged away with mkdir, mv and rmdir', async () => {
    await withImage(async (directory, image) => {
      const folder = join(directory, 'images');
      const states = new Map<string, string>();
      await withMount(folder, {}, async (tree) => {
        const disk = tree.path('vm1', 'disk.raw');
        for (const [index, name] of ['a', 'b', 'c'].entries()) {
          fill(tree, index + 1, index * MIB, 3 * MIB);
          states.set(name, digestOf(disk));
          await mkdir(tree.path('vm1', 'overlays', name));
          expect(digestOf(disk)).toBe(states.get(name));
        }
        fill(tree, 9, 2 * MIB, 3 * MIB);
        const point = tree.path('vm1', 'overlays', 'b');
        expect((await readdir(point)).sort()).toEqual(['disk.raw', 'info.json', 'overlay.qcow2', 'partitions']);
        expect(digestOf(join(point, 'disk.raw'))).toBe(states.get('b'));
        expect(digestOf(join(point, 'overlay.qcow2'))).toBe(digestOf(join(folder, 'b.qcow2')));
        await expect(writeFile(join(point, 'overlay.qcow2'), 'x')).rejects.toEqual(errno('EROFS'));
        await expect(mkdir(point)).rejects.toEqual(errno('EEXIST'));
        await rename(point, tree.path('vm1', 'overlays', 'x'));
        states.set('x', states.get('b') as string);
        expect(await readdir(tree.path('vm1', 'overlays'))).toEqual(['a', 'c', 'x']);
      });
      const live = await withMount(join(folder, 'c.qcow2'), {}, async (tree) => {
        expect(await readdir(tree.mountpoint)).toEqual(['README', 'vm1']);
        for (const name of ['a', 'x', 'c']) {
          expect(digestOf(tree.path('vm1', 'overlays', name, 'disk.raw'))).toBe(states.get(name));
        }
        const info = JSON.parse(await readFile(tree.path('vm1', 'info.json'), 'utf8'));
        expect(info.chain.map(({ file }: { file: string }) => file)).toEqual(
          ['c', 'x', 'a', 'vm1'].map((name) => join(folder, `${name}.qcow2`)),
        );
        const before = digestOf(tree.path('vm1', 'disk.raw'));
        await control(tree, 'rollback x');
        expect(digestOf(tree.path('vm1', 'disk.raw'))).toBe(states.get('x'));
        await control(tree, 'rollback before-rollback');
        expect(digestOf(tree.path('vm1', 'disk.raw'))).toBe(before);
        for (const name of await readdir(tree.path('vm1', 'overlays'))) {
          await rmdir(tree.path('vm1', 'overlays', name));
          expect(digestOf(tree.path('vm1', 'disk.raw'))).toBe(before);
        }
        return before;
      });
      expect(await readdir(folder)).toEqual(['vm1.qcow2']);
      await runOk('qemu-img', ['check', '-q', image]);
      await runOk('qemu-img', ['convert', '-O', 'raw', image, join(directory, 'raw')]);
      expect(digestOf(join(directory, 'raw'))).toBe(live);
    });
  });

  it('are merged while someone writes, whichever layer it is', async () => {
    await withImage(async (directory, image) => {
      let writer: Writer | undefined;
      await withMount(image, {}, async (tree) => {
        writer = new Writer(tree);
        try {
          for (const name of ['a', 'b', 'c']) {
            await mkdir(tree.path('vm1', 'overlays', name));
            const now = writer.count;
            while (writer.count < now + 300) await giveWay();
          }
          for (const name of ['b', 'c', 'a']) {
            const now = writer.count;
            await rmdir(tree.path('vm1', 'overlays', name));
            while (writer.count < now + 100) await giveWay();
          }
        } finally {
          await writer.stop();
        }
        writer.check(readFileSync(tree.path('vm1', 'disk.raw')));
      });
      expect(await readdir(join(directory, 'images'))).toEqual(['vm1.qcow2']);
      await runOk('qemu-img', ['check', '-q', image]);
      await runOk('qemu-img', ['convert', '-O', 'raw', image, join(directory, 'raw')]);
      writer?.check(readFileSync(join(directory, 'raw')));
    });
  });

  it('survive a server that is killed while it merges, and the merge goes on', async () => {
    await withImage(async (directory, image) => {
      const mountpoint = join(directory, 'mnt');
      await mkdir(mountpoint);
      const tree = await startServer([image], mountpoint, {});
      let live: string;
      try {
        fill(tree, 1, 0, 40 * MIB);
        await mkdir(tree.path('vm1', 'overlays', 'a'));
        fill(tree, 2, MIB, 40 * MIB);
        live = digestOf(tree.path('vm1', 'disk.raw'));
        await runOk('sync', [tree.path('vm1', 'disk.raw')]);
        let over = false;
        const merging = rmdir(tree.path('vm1', 'overlays', 'a'))
          .catch(() => {})
          .finally(() => {
            over = true;
          });
        while (!over && !(await control(tree, 'status')).includes('del-ext-checkpoint')) await giveWay();
        tree.signal('SIGKILL');
        await tree.ended;
        await merging;
      } finally {
        tree.signal('SIGKILL');
        await vdskfs(['unmount', mountpoint]);
      }
      await withMount(image, { mountpoint }, async (again) => {
        expect(digestOf(again.path('vm1', 'disk.raw'))).toBe(live);
        if ((await readdir(again.path('vm1', 'overlays'))).length > 0) await rmdir(again.path('vm1', 'overlays', 'a'));
        expect(digestOf(again.path('vm1', 'disk.raw'))).toBe(live);
      });
      expect(await readdir(join(directory, 'images'))).toEqual(['vm1.qcow2']);
      await runOk('qemu-img', ['check', '-q', image]);
    });
  });

  it('are discarded on request only, and not while the disk is in use', async () => {
    await withImage(async (directory, image) => {
      await withMount(image, {}, async (tree) => {
        fill(tree, 1, 0, MIB);
        const then = digestOf(tree.path('vm1', 'disk.raw'));
        await mkdir(tree.path('vm1', 'overlays', 'a'));
        fill(tree, 2, 0, MIB);
        const fd = openSync(tree.path('vm1', 'disk.raw'), 'r+');
        await expect(control(tree, 'del-ext-checkpoint a --discard')).rejects.toEqual(errno('EBUSY'));
        closeSync(fd);
        expect(await control(tree, 'del-ext-checkpoint a --discard')).toMatch(/discarded/);
        expect(digestOf(tree.path('vm1', 'disk.raw'))).toBe(then);
      });
      expect(await readdir(join(directory, 'images'))).toEqual(['vm1.qcow2']);
      expect((await stat(image)).isFile()).toBe(true);
    });
  });

  it('of images that are not mounted: checkpoint --external, delete --external', async () => {
    await withImage(async (directory, image) => {
      const done = async (...args: string[]): Promise<string> => {
        const { status, stderr, stdout } = await vdskfs(args);
        expect(stderr).toBe('');
        expect(status).toBe(0);
        return stdout;
      };
      const overlays = join(directory, 'overlays');
      await mkdir(overlays);
      await done('checkpoint', '--external', image, 'a');
      await runOk('qemu-io', ['-c', 'write -P 5 0 1M', join(directory, 'images', 'a.qcow2')]);
      await withMount(image, { args: ['--overlay-dir', overlays] }, async (tree) => {
        expect(
          readFileSync(tree.path('vm1', 'disk.raw'))
            .subarray(0, MIB)
            .every((byte) => byte === 5),
        ).toBe(true);
        await mkdir(tree.path('vm1', 'overlays', 'b'));
      });
      expect(await readdir(overlays)).toEqual(['b.qcow2']);
      await done('rename', image, 'a', 'c');
      await done('delete', '--external', image, 'c');
      expect(await done('delete', '--external', '--discard', image, 'b')).toMatch(/discarded/);
      expect(await readdir(join(directory, 'images'))).toEqual(['vm1.qcow2']);
      await runOk('qemu-io', ['-c', 'read -P 5 0 1M', image]);
    });
  });
});
