/** What every driver must do with a tree, seen by a process that uses the mount. What one has no call for is skipped. */

import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import {
  chmodSync,
  closeSync,
  constants,
  fsyncSync,
  ftruncateSync,
  linkSync,
  lstatSync,
  mkdirSync,
  openSync,
  promises,
  readdirSync,
  readFileSync,
  readSync,
  renameSync,
  rmdirSync,
  statfsSync,
  statSync,
  symlinkSync,
  truncateSync,
  unlinkSync,
  utimesSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { afterAll, beforeAll, describe, expect, it, onTestFinished } from 'vitest';
import type { DriverCapabilities } from '../../src/fuse/driver.ts';
import { findStaleMount, listMounts } from '../../src/fuse/mount-list.ts';
import { clearStaleMount } from '../../src/fuse/mounting.ts';
import { systemCalls } from '../../src/os/system-calls.ts';
import { DEFERRED_FROM, DISK_BYTES } from './memory-disk.ts';
import { BORN_MS } from './memory-file-system.ts';
import { type DriverName, MountedMemory, type ServerOptions } from './mounted-memory.ts';

/** The errno name that a call fails with; `none` if it does not. */
export function errnoOf(work: () => unknown): string {
  try {
    work();
  } catch (error) {
    return String((error as NodeJS.ErrnoException).code);
  }
  return 'none';
}

/** A mount for one test, gone when the test is. */
export async function mounted(driver: DriverName, options: Partial<ServerOptions> = {}): Promise<MountedMemory> {
  const tree = await MountedMemory.start({ driver, ...options });
  onTestFinished(() => tree.remove());
  return tree;
}

/** An open file for one test, closed when the test is over, before its mount goes. */
export function opened(path: string, flags: string | number): number {
  const fd = openSync(path, flags);
  onTestFinished(() => {
    closeSync(fd);
  });
  return fd;
}

export function testDriver(driver: DriverName, capabilities: DriverCapabilities): void {
  describe(`the tree through ${driver}`, () => {
    let tree: MountedMemory;
    beforeAll(async () => {
      tree = await MountedMemory.start({ driver });
    });
    afterAll(() => tree?.remove());

    it('has the capabilities that the driver states', () => {
      expect(tree.capabilities).toEqual(capabilities);
    });

    it('is listed with its source and as a mount of vdskfs', async () => {
      const mine = (await listMounts()).find(({ mountpoint }) => mountpoint === tree.mountpoint);
      expect(mine).toMatchObject({ source: 'memory', readOnly: false, type: 'fuse.vdskfs' });
    });

    describe('directories', () => {
      it('are listed with the types of their entries', () => {
        const entries = readdirSync(tree.mountpoint, { withFileTypes: true });
        const types = Object.fromEntries(entries.map((entry) => [entry.name, entry.isDirectory() ? 'd' : 'f']));
        expect(types).toEqual({ 'disk.raw': 'f', 'hello.txt': 'f', 'kept.txt': 'f', slow: 'd', many: 'd' });
      });

      it('are listed whole when they do not fit one READDIR', () => {
        const names = readdirSync(tree.path('many'));
        expect(names).toHaveLength(1000);
        expect(new Set(names).size).toBe(1000);
      });

      it('are made, renamed and removed', () => {
        mkdirSync(tree.path('made'));
        renameSync(tree.path('made'), tree.path('slow', 'renamed'));
        expect(readdirSync(tree.path('slow'))).toEqual(['renamed']);
        expect(statSync(tree.path('slow')).nlink).toBe(3);
        rmdirSync(tree.path('slow', 'renamed'));
        expect(readdirSync(tree.path('slow'))).toEqual([]);
        expect(errnoOf(() => statSync(tree.path('made')))).toBe('ENOENT');
      });

      it('have names of up to 255 bytes of UTF-8', () => {
        const longest = 'ä'.repeat(127);
        mkdirSync(tree.path(longest));
        expect(readdirSync(tree.mountpoint)).toContain(longest);
        rmdirSync(tree.path(longest));
        expect(errnoOf(() => mkdirSync(tree.path('ä'.repeat(128))))).toBe('ENAMETOOLONG');
      });
    });

    describe('attributes', () => {
      it('are those of the tree: size, st_blocks, st_blksize, owner, times', () => {
        const stat = statSync(tree.path('hello.txt'));
        expect(stat).toMatchObject({ size: 6, blocks: 1, blksize: 4096, nlink: 1, uid: 0, gid: 0, mode: 0o100644 });
        expect(stat.mtimeMs).toBe(BORN_MS);
        expect(stat.ctimeMs).toBe(BORN_MS);
        expect(statSync(tree.mountpoint)).toMatchObject({ ino: 1, blksize: 4096, mode: 0o040755 });
      });

      it('have inode numbers that stay', () => {
        const { ino } = lstatSync(tree.path('kept.txt'));
        renameSync(tree.path('kept.txt'), tree.path('moved.txt'));
        expect(lstatSync(tree.path('moved.txt')).ino).toBe(ino);
        renameSync(tree.path('moved.txt'), tree.path('kept.txt'));
      });

      it('change by chmod, truncate and utimes', () => {
        writeFileSync(tree.path('changing'), 'abcdef');
        chmodSync(tree.path('changing'), 0o600);
        truncateSync(tree.path('changing'), 3);
        utimesSync(tree.path('changing'), 1, 2);
        expect(statSync(tree.path('changing'))).toMatchObject({ size: 3, mode: 0o100600 });
        expect(readFileSync(tree.path('changing'), 'utf8')).toBe('abc');
        unlinkSync(tree.path('changing'));
      });

      it('statfs tells blocks and the length of names', () => {
        expect(statfsSync(tree.mountpoint)).toMatchObject({
          bsize: 4096,
          blocks: 2 ** 30 / 4096,
          bfree: 2 ** 29 / 4096,
          bavail: 2 ** 28 / 4096,
          files: 7,
        });
      });
    });

    describe('failures have the errno that the tree gave', () => {
      it.each([
        ['ENOENT', 'what is not there', () => openSync(tree.path('absent'), 'r')],
        ['EEXIST', 'mkdir of what is there', () => mkdirSync(tree.path('slow'))],
        ['ENOTDIR', 'a path through a file', () => statSync(tree.path('hello.txt', 'below'))],
        ['ENOTEMPTY', 'rmdir of a full directory', () => rmdirSync(tree.path('many'))],
        ['EPERM', 'unlink of the disk', () => unlinkSync(tree.path('disk.raw'))],
        ['EPERM', 'truncate of the disk', () => truncateSync(tree.path('disk.raw'), 1)],
        ['EPERM', 'a symbolic link', () => symlinkSync('target', tree.path('link'))],
        ['EPERM', 'a hard link', () => linkSync(tree.path('hello.txt'), tree.path('link'))],
      ])('%s: %s', (errno, _what, work) => {
        expect(errnoOf(work)).toBe(errno);
      });

      it('ENOSPC: a write past the end of the disk', () => {
        const disk = opened(tree.path('disk.raw'), 'r+');
        expect(errnoOf(() => writeSync(disk, Buffer.alloc(4096), 0, 4096, DISK_BYTES - 4095))).toBe('ENOSPC');
      });
    });

    describe('files', () => {
      it('are created, appended to, read and unlinked', () => {
        writeFileSync(tree.path('new'), 'one');
        writeFileSync(tree.path('new'), 'two', { flag: 'a' });
        expect(readFileSync(tree.path('new'), 'utf8')).toBe('onetwo');
        writeFileSync(tree.path('new'), 'three');
        expect(readFileSync(tree.path('new'), 'utf8')).toBe('three');
        expect(errnoOf(() => openSync(tree.path('new'), 'wx'))).toBe('EEXIST');
        unlinkSync(tree.path('new'));
        expect(errnoOf(() => statSync(tree.path('new')))).toBe('ENOENT');
      });

      it('are released when they are closed', async () => {
        const before = await tree.ask({ kind: 'openFiles' });
        for (let i = 0; i < 20; i++) readFileSync(tree.path('hello.txt'));
        // RELEASE is sent after close(2) has returned.
        await expect.poll(() => tree.ask({ kind: 'openFiles' })).toBe(before);
      });

      it('show a change made by the tree at their next open', async () => {
        await tree.ask({ kind: 'rewrite', name: 'hello.txt', text: 'another\n', notify: false });
        expect(readFileSync(tree.path('hello.txt'), 'utf8')).toBe('another\n');
        await tree.ask({ kind: 'rewrite', name: 'hello.txt', text: 'hello\n', notify: false });
        expect(readFileSync(tree.path('hello.txt'), 'utf8')).toBe('hello\n');
      });
    });

    describe('the disk', () => {
      it.each([
        ['by the data threads', 12_345],
        ['by the main thread', DEFERRED_FROM + 777],
        ['by both', DEFERRED_FROM - 2 ** 20],
      ])('takes and gives back 4 MiB at odd offsets, served %s', (_rule, offset) => {
        const disk = opened(tree.path('disk.raw'), 'r+');
        const data = randomBytes(4 * 2 ** 20 + 13);
        expect(writeSync(disk, data, 0, data.length, offset)).toBe(data.length);
        const back = Buffer.alloc(data.length);
        expect(readSync(disk, back, 0, back.length, offset)).toBe(back.length);
        expect(back.equals(data)).toBe(true);
      });

      it('is read short at its end, and not beyond', () => {
        const disk = opened(tree.path('disk.raw'), 'r');
        expect(readSync(disk, Buffer.alloc(4096), 0, 4096, DISK_BYTES - 100)).toBe(100);
        expect(readSync(disk, Buffer.alloc(4096), 0, 4096, DISK_BYTES)).toBe(0);
        expect(readSync(disk, Buffer.alloc(4096), 0, 4096, 2 ** 40)).toBe(0);
      });

      it('takes many writes at once, each whole', async () => {
        const file = await promises.open(tree.path('disk.raw'), 'r+');
        onTestFinished(() => file.close());
        const BLOCK = 65536;
        const blocks = Array.from({ length: 64 }, () => randomBytes(BLOCK));
        await Promise.all(blocks.map((block, i) => file.write(block, 0, BLOCK, i * BLOCK)));
        const back = await Promise.all(blocks.map((_, i) => file.read(Buffer.alloc(BLOCK), 0, BLOCK, i * BLOCK)));
        for (const [i, block] of blocks.entries()) expect(back[i]?.buffer.equals(block)).toBe(true);
      });

      it('is the same through every open', () => {
        const one = opened(tree.path('disk.raw'), 'r+');
        const other = opened(tree.path('disk.raw'), 'r');
        writeSync(one, Buffer.from('seen at once'), 0, 12, 1_000_000);
        const back = Buffer.alloc(12);
        readSync(other, back, 0, 12, 1_000_000);
        expect(back.toString()).toBe('seen at once');
      });

      it('is told of fsync, of close, and of writes that must be durable', async () => {
        const count = (name: 'SYNCS' | 'SYNC_WRITES' | 'FLUSHES') => tree.ask({ kind: 'counter', name });
        const before = {
          syncs: await count('SYNCS'),
          writes: await count('SYNC_WRITES'),
          flushes: await count('FLUSHES'),
        };
        const disk = openSync(tree.path('disk.raw'), constants.O_RDWR | constants.O_DSYNC);
        try {
          writeSync(disk, Buffer.alloc(512), 0, 512, 0);
          fsyncSync(disk);
        } finally {
          closeSync(disk);
        }
        expect(await count('SYNCS')).toBe(before.syncs + 1);
        expect(await count('SYNC_WRITES')).toBe(before.writes + 1);
        expect(await count('FLUSHES')).toBe(before.flushes + 1);
      });

      it.skipIf(!capabilities.seekData)('tells by lseek where data is', () => {
        const disk = opened(tree.path('disk.raw'), 'r+');
        const { seek, punchHole } = systemCalls();
        punchHole(disk, 0, DEFERRED_FROM);
        punchHole(disk, DEFERRED_FROM, DISK_BYTES - DEFERRED_FROM);
        writeSync(disk, Buffer.alloc(4096, 1), 0, 4096, 2 ** 20);
        expect(seek(disk, 0, 'data')).toBe(2 ** 20);
        expect(seek(disk, 2 ** 20, 'hole')).toBe(2 ** 20 + 4096);
        expect(seek(disk, 2 ** 20 + 4096, 'hole')).toBe(2 ** 20 + 4096);
        expect(() => seek(disk, 2 ** 20 + 4096, 'data')).not.toThrow(); // ENXIO: nothing more
        expect(seek(disk, 2 ** 20 + 4096, 'data')).toBeLessThan(0);
      });

      it.skipIf(!capabilities.allocate)('gives space back by fallocate, also through the main thread', () => {
        const disk = opened(tree.path('disk.raw'), 'r+');
        const { punchHole, zeroRange } = systemCalls();
        for (const offset of [0, DEFERRED_FROM]) {
          writeSync(disk, randomBytes(2 ** 20), 0, 2 ** 20, offset);
          const full = statSync(tree.path('disk.raw')).blocks;
          expect(punchHole(disk, offset, 2 ** 19)).toBe(0);
          expect(statSync(tree.path('disk.raw')).blocks).toBe(full - 2 ** 19 / 512);
          expect(zeroRange(disk, offset + 2 ** 19, 2 ** 19)).toBe(0);
          expect(statSync(tree.path('disk.raw')).blocks).toBe(full - 2 ** 19 / 512);
          const back = Buffer.alloc(2 ** 20, 1);
          readSync(disk, back, 0, 2 ** 20, offset);
          expect(back.equals(Buffer.alloc(2 ** 20))).toBe(true);
        }
      });

      it.skipIf(!capabilities.allocate)('an ordinary file of the tree refuses fallocate', () => {
        const file = opened(tree.path('hello.txt'), 'r+');
        expect(systemCalls().punchHole(file, 0, 1)).toBeLessThan(0);
        expect(readFileSync(tree.path('hello.txt'), 'utf8')).toBe('hello\n');
      });
    });

    describe.skipIf(!capabilities.notifications)('notifications', () => {
      it('drop the pages that the kernel kept', async () => {
        expect(readFileSync(tree.path('kept.txt'), 'utf8')).toBe('before\n');
        await tree.ask({ kind: 'rewrite', name: 'kept.txt', text: 'after!\n', notify: false });
        expect(readFileSync(tree.path('kept.txt'), 'utf8')).toBe('before\n');
        await tree.ask({ kind: 'rewrite', name: 'kept.txt', text: 'after!\n', notify: true });
        await expect.poll(() => readFileSync(tree.path('kept.txt'), 'utf8')).toBe('after!\n');
      });

      it('drop a name that the kernel kept', async () => {
        mkdirSync(tree.path('dropped'));
        expect(statSync(tree.path('dropped')).isDirectory()).toBe(true);
        await tree.ask({ kind: 'drop', name: 'dropped' });
        await expect.poll(() => errnoOf(() => statSync(tree.path('dropped')))).toBe('ENOENT');
      });
    });

    it('answers after its event loop was blocked', async () => {
      const blocked = tree.ask({ kind: 'block', ms: 200 });
      expect(readFileSync(tree.path('hello.txt'), 'utf8')).toBe('hello\n');
      await blocked;
    });
  });

  describe(`the end of a mount through ${driver}`, () => {
    it('comes when the server unmounts it: nothing is open, and the process ends by itself', async () => {
      const tree = await mounted(driver);
      readFileSync(tree.path('hello.txt'));
      await tree.ask({ kind: 'unmount' });
      expect(await tree.ended).toMatchObject({ openFiles: 0 });
      expect(await tree.exited).toBe(0);
      expect(readdirSync(tree.mountpoint)).toEqual([]);
    });

    it('is refused with EBUSY while a file is open, and who holds it is named', async () => {
      const tree = await mounted(driver);
      const fd = openSync(tree.path('disk.raw'), 'r');
      try {
        await expect(tree.ask({ kind: 'unmount' })).rejects.toMatchObject({
          errno: 'EBUSY',
          message: expect.stringContaining(`(pid ${process.pid})`),
        });
        expect(readSync(fd, Buffer.alloc(512), 0, 512, 0)).toBe(512);
      } finally {
        closeSync(fd);
      }
      await tree.ask({ kind: 'unmount' });
      expect(await tree.exited).toBe(0);
    });

    it('comes when somebody else unmounts it', async () => {
      const tree = await mounted(driver);
      await runOk('umount', tree.mountpoint);
      expect(await tree.ended).toMatchObject({ openFiles: 0 });
      expect(await tree.exited).toBe(0);
    });

    it('waits for files that are open when somebody detaches it lazily', async () => {
      const tree = await mounted(driver);
      const disk = openSync(tree.path('disk.raw'), 'r+');
      try {
        await runOk('umount', '-l', tree.mountpoint);
        expect(readdirSync(tree.mountpoint)).toEqual([]);
        expect(writeSync(disk, Buffer.from('still here'), 0, 10, 0)).toBe(10);
        expect(await tree.ask({ kind: 'openFiles' })).toBe(1);
      } finally {
        closeSync(disk);
      }
      expect(await tree.ended).toMatchObject({ openFiles: 0 });
      expect(await tree.exited).toBe(0);
    });

    it('without an unmount leaves a stale mount, which is found, refused and cleared', async () => {
      const tree = await mounted(driver);
      expect(await findStaleMount(tree.mountpoint)).toBeUndefined();
      await tree.kill();
      const stale = await findStaleMount(tree.mountpoint);
      expect(stale).toMatchObject({ mountpoint: tree.mountpoint, type: 'fuse.vdskfs' });
      await expect(MountedMemory.start({ driver, mountpoint: tree.mountpoint })).rejects.toThrow('server is dead');
      await clearStaleMount(stale!);
      expect(await findStaleMount(tree.mountpoint)).toBeUndefined();
      expect(readdirSync(tree.mountpoint)).toEqual([]);
    });
  });

  describe(`mounting through ${driver}`, () => {
    it('read-only refuses writers with EROFS', async () => {
      const tree = await mounted(driver, { readOnly: true });
      expect(errnoOf(() => mkdirSync(tree.path('made')))).toBe('EROFS');
      expect(errnoOf(() => openSync(tree.path('disk.raw'), 'r+'))).toBe('EROFS');
      expect(readFileSync(tree.path('hello.txt'), 'utf8')).toBe('hello\n');
    });

    it('works without a data plane', async () => {
      const tree = await mounted(driver, { dataPlane: false });
      const disk = openSync(tree.path('disk.raw'), 'r+');
      try {
        const data = randomBytes(3 * 2 ** 20);
        writeSync(disk, data, 0, data.length, 1);
        const back = Buffer.alloc(data.length);
        readSync(disk, back, 0, back.length, 1);
        expect(back.equals(data)).toBe(true);
        fsyncSync(disk);
        expect(errnoOf(() => ftruncateSync(disk, 1))).toBe('EPERM');
      } finally {
        closeSync(disk);
      }
    });

    it('shows a source with commas and spaces as it is', async () => {
      const source = '/images/a, b.qcow2';
      const tree = await mounted(driver, { source });
      const mine = (await listMounts()).find(({ mountpoint }) => mountpoint === tree.mountpoint);
      expect(mine?.source).toBe(source);
    });

    it('on what is no directory is refused, saying so', async () => {
      const tree = await mounted(driver);
      const file = tree.path('hello.txt');
      await expect(MountedMemory.start({ driver, mountpoint: file })).rejects.toMatchObject({
        errno: 'ENOTDIR',
        message: expect.stringContaining('not a directory'),
      });
    });
  });
}

/** Run a program to its end without blocking: it may need the server, which may need this process. */
export function runOk(program: string, ...args: readonly string[]): Promise<void> {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, { stdio: ['ignore', 'inherit', 'inherit'] });
    child.on('error', reject);
    child.on('exit', (status) => {
      if (status === 0) resolve();
      else reject(new Error(`${program} ended with status ${status}`));
    });
  });
}
