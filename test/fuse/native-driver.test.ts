import { execFileSync, spawn } from 'node:child_process';
import { closeSync, fsyncSync, mkdirSync, openSync, readFileSync, readSync, statSync, writeSync } from 'node:fs';
import koffi from 'koffi';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { listMounts, mountAt } from '../../src/fuse/mount-list.ts';
import { nativeCapabilities } from '../../src/fuse/native-driver.ts';
import { errnoOf, mounted, opened, runOk, testDriver } from './driver-suite.ts';
import { BUG_BYTES, BUSY_BYTES } from './memory-disk.ts';
import { MountedMemory } from './mounted-memory.ts';

testDriver('native', nativeCapabilities);

describe('the native driver', () => {
  let tree: MountedMemory;
  beforeAll(async () => {
    tree = await MountedMemory.start({ driver: 'native' });
  });
  afterAll(() => tree?.remove());

  it('answers what the plane throws: FsError by its errno, a bug by EIO, and serves on', () => {
    const disk = opened(tree.path('disk.raw'), 'r');
    const read = (bytes: number): number => readSync(disk, Buffer.alloc(bytes), 0, bytes, 0);
    expect(errnoOf(() => read(BUSY_BYTES))).toBe('EBUSY');
    for (let i = 0; i < 4; i++) expect(errnoOf(() => read(BUG_BYTES))).toBe('EIO');
    expect(read(512)).toBe(512);
  });

  it('serves the disk while its event loop is blocked', async () => {
    const disk = opened(tree.path('disk.raw'), 'r+');
    const blocked = tree.ask({ kind: 'block', ms: 300 });
    let done = false;
    blocked.then(() => {
      done = true;
    });
    writeSync(disk, Buffer.from('on time'), 0, 7, 0);
    const back = Buffer.alloc(7);
    readSync(disk, back, 0, 7, 0);
    expect(back.toString()).toBe('on time');
    expect(done).toBe(false);
    await blocked;
  });

  it('has RENAME_NOREPLACE, and refuses to exchange two names', () => {
    const library = koffi.load(null);
    const renameat2 = library.func('int renameat2(int, const char *, int, const char *, unsigned int)');
    const AT_FDCWD = -100;
    const rename = (from: string, to: string, flags: number): string => {
      if (renameat2(AT_FDCWD, tree.path(from), AT_FDCWD, tree.path(to), flags) === 0) return 'done';
      return Object.entries(koffi.os.errno).find(([, number]) => number === koffi.errno())?.[0] ?? 'unknown';
    };
    mkdirSync(tree.path('from'));
    mkdirSync(tree.path('taken'));
    expect(rename('from', 'taken', 1)).toBe('EEXIST');
    expect(rename('from', 'taken', 2)).toBe('EINVAL');
    expect(rename('from', 'free', 1)).toBe('done');
    expect(statSync(tree.path('free')).isDirectory()).toBe(true);
  });

  it('lets the disk be mapped shared, although nothing of it is cached', () => {
    const library = koffi.load(null);
    const mmap = library.func('intptr_t mmap(intptr_t, size_t, int, int, int, int64_t)');
    const munmap = library.func('int munmap(intptr_t, size_t)');
    const memcmp = library.func('int memcmp(intptr_t, const uint8_t *, size_t)');
    const disk = opened(tree.path('disk.raw'), 'r+');
    writeSync(disk, Buffer.from('mapped'), 0, 6, 8192);
    const PROT_READ = 1;
    const MAP_SHARED = 1;
    const address = mmap(0, 4096, PROT_READ, MAP_SHARED, disk, 8192);
    expect(Number(address)).not.toBe(-1);
    try {
      expect(memcmp(address, Buffer.from('mapped'), 6)).toBe(0);
    } finally {
      munmap(address, 4096);
    }
  });

  it('answers EINTR to a caller that a signal took away', async () => {
    const mkdir = spawn('mkdir', [tree.path('slow', 'never')], { stdio: 'ignore' });
    const ended = new Promise<NodeJS.Signals | null>((resolve) => mkdir.once('exit', (_, signal) => resolve(signal)));
    await expect.poll(() => tree.ask({ kind: 'waiting' })).toBe(1);
    mkdir.kill('SIGINT');
    expect(await ended).toBe('SIGINT');
    expect(await tree.ask({ kind: 'waiting' })).toBe(0);
  });

  it('reads ahead 1 MiB', async () => {
    const device = (await mountAt(tree.mountpoint))?.device;
    expect(readFileSync(`/sys/class/bdi/${device}/read_ahead_kb`, 'utf8')).toBe('1024\n');
  });

  it('is not kept mounted by a caller that was killed while it waited', async () => {
    const own = await mounted('native');
    const mkdir = spawn('mkdir', [own.path('slow', 'never')], { stdio: 'ignore' });
    const ended = new Promise<void>((resolve) => mkdir.once('exit', () => resolve()));
    await expect.poll(() => own.ask({ kind: 'waiting' })).toBe(1);
    mkdir.kill('SIGKILL');
    await ended;
    await own.ask({ kind: 'unmount' });
    expect(await own.exited).toBe(0);
  });

  it('ends when its connection is aborted, whatever was open', async () => {
    const own = await mounted('native');
    const disk = openSync(own.path('disk.raw'), 'r');
    await runOk('umount', '-c', '-f', '-l', own.mountpoint);
    expect(await own.ended).toMatchObject({ openFiles: 0 });
    expect(await own.exited).toBe(0);
    expect(errnoOf(() => readSync(disk, Buffer.alloc(1), 0, 1, 0))).toBe('ENOTCONN');
    expect(errnoOf(() => closeSync(disk))).toBe('ENOTCONN'); // its FLUSH; the descriptor is closed all the same
  });

  it('carries a loop device, which is named when it is in the way', async () => {
    const own = await mounted('native');
    const loop = execFileSync('losetup', ['--find', '--show', own.path('disk.raw')], { encoding: 'utf8' }).trim();
    try {
      const device = openSync(loop, 'r+');
      const block = Buffer.alloc(4096, 7);
      try {
        writeSync(device, block, 0, block.length, 8192);
        fsyncSync(device);
      } finally {
        closeSync(device);
      }
      const back = Buffer.alloc(block.length);
      readSync(opened(own.path('disk.raw'), 'r'), back, 0, back.length, 8192);
      expect(back.equals(block)).toBe(true);
      await expect(own.ask({ kind: 'unmount' })).rejects.toThrow(`${loop} (a loop device)`);
    } finally {
      execFileSync('losetup', ['--detach', loop]);
    }
  });

  it('mounts nothing if its data threads cannot start', async () => {
    const start = MountedMemory.start({ driver: 'native', dataPlane: 'broken', source: 'broken' });
    await expect(start).rejects.toThrow('a data thread of the mount broke');
    expect((await listMounts()).filter(({ source }) => source === 'broken')).toEqual([]);
  });

  it.each([1, 4])('serves with %d data threads', async (threads) => {
    const own = await mounted('native', { threads });
    const disk = openSync(own.path('disk.raw'), 'r+');
    try {
      writeSync(disk, Buffer.from('x'), 0, 1, 5);
      expect(readFileSync(own.path('hello.txt'), 'utf8')).toBe('hello\n');
    } finally {
      closeSync(disk);
    }
  });
});
