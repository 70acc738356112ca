import { execFileSync } from 'node:child_process';
import * as fs from 'node:fs';
import { mkdirSync, mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { HostFile } from '../../src/storage/host-file.ts';
import { storageContract } from './storage-contract.ts';

let folder: string;
let number = 0;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'vdskfs-host-file-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const freshPath = () => join(folder, `${number++}.raw`);
const fresh = () => HostFile.open(freshPath(), { readOnly: false, create: 'new' });

/** The FsError that `action` throws. */
function failureOf(action: () => unknown): FsError {
  try {
    action();
  } catch (error) {
    expect(error).toBeInstanceOf(FsError);
    return error as FsError;
  }
  throw new Error('nothing was thrown');
}

const MIB = 1024 * 1024;

storageContract('HostFile', (action) => {
  using file = fresh();
  action(file);
});

describe('a descriptor', () => {
  it('is shared with other threads: one that adopts the file sees the same bytes, and does not close it', async () => {
    using file = fresh();
    file.write(Uint8Array.of(1, 2, 3), 0, 3, 0);
    const code = `
      const { parentPort, workerData } = require('node:worker_threads');
      const { readSync, writeSync } = require('node:fs');
      const bytes = new Uint8Array(3);
      readSync(workerData.fd, bytes, 0, 3, 0);
      writeSync(workerData.fd, Uint8Array.of(7), 0, 1, 3);
      parentPort.postMessage([workerData.path, workerData.readOnly, ...bytes]);
    `;
    const worker = new Worker(code, { eval: true, workerData: file.share() });
    const answer = await new Promise((resolve, reject) => {
      worker.once('message', resolve);
      worker.once('error', reject);
    });
    await worker.terminate();
    expect(answer).toEqual([file.path, false, 1, 2, 3]);
    {
      using adopted = HostFile.adopt(file.share());
      const target = new Uint8Array(4);
      expect(adopted.read(target, 0, 4, 0)).toBe(4);
      expect([...target]).toEqual([1, 2, 3, 7]);
    }
    expect(file.size()).toBe(4);
  });

  it('is closed once, and not touched any more after the end of its owner', () => {
    const file = fresh();
    file[Symbol.dispose]();
    file[Symbol.dispose]();
    expect(() => file.read(new Uint8Array(1), 0, 1, 0)).toThrow();
    expect(() => file.write(new Uint8Array(1), 0, 1, 0)).toThrow();
  });
});

describe('a host that answers in pieces', () => {
  /** HostFile over `node:fs` with some calls replaced. */
  async function hostFileWith(calls: Partial<typeof fs>): Promise<typeof HostFile> {
    vi.resetModules();
    vi.doMock('node:fs', () => ({ ...fs, ...calls }));
    return (await import('../../src/storage/host-file.ts')).HostFile;
  }
  afterEach(() => {
    vi.doUnmock('node:fs');
    vi.resetModules();
  });

  const failed = (code: 'EINTR' | 'EIO') =>
    Object.assign(new Error(code), { code, errno: -constants.errno[code], syscall: 'read' });

  /** At most 3 bytes a call, and every second call interrupted by a signal. */
  function inPieces(
    call: (fd: number, bytes: Uint8Array, at: number, length: number, position: number) => number,
  ): (...args: never[]) => number {
    let turn = 0;
    return (...args: unknown[]) => {
      if (turn++ % 2 === 0) throw failed('EINTR');
      const [fd, bytes, at, length, position] = args as [number, Uint8Array, number, number, number];
      return call(fd, bytes, at, Math.min(3, length), position);
    };
  }

  it('is asked until all is read and written', async () => {
    const Pieces = await hostFileWith({
      readSync: inPieces(fs.readSync) as typeof fs.readSync,
      writeSync: inPieces(fs.writeSync) as typeof fs.writeSync,
    });
    using file = Pieces.open(freshPath(), { readOnly: false, create: 'new' });
    const bytes = Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8);
    file.write(bytes, 0, 8, 100);
    const target = new Uint8Array(10);
    expect(file.read(target, 1, 9, 100)).toBe(8);
    expect([...target]).toEqual([0, ...bytes, 0]);
  });

  it('but not forever, when it takes nothing', async () => {
    const Stuck = await hostFileWith({ writeSync: (() => 0) as typeof fs.writeSync });
    using file = Stuck.open(freshPath(), { readOnly: false, create: 'new' });
    expect(() => file.write(Uint8Array.of(1), 0, 1, 0)).toThrow(expect.objectContaining({ errno: 'EIO' }));
  });

  it('and whose flush fails is believed', async () => {
    const Failing = await hostFileWith({
      fdatasyncSync: () => {
        throw failed('EIO');
      },
    });
    const path = freshPath();
    using file = Failing.open(path, { readOnly: false, create: 'new' });
    expect(() => file.flush()).toThrow(
      expect.objectContaining({
        errno: 'EIO',
        message: `cannot flush '${path}'; what was written last may be lost: the host disk reported an I/O error (EIO)`,
      }),
    );
  });
});

describe('refusals', () => {
  it.each([
    ['a missing file', () => HostFile.open(join(folder, 'none'), { readOnly: true }), 'ENOENT', 'no such file'],
    ['a folder', () => HostFile.open(folder, { readOnly: true }), 'EISDIR', 'a directory'],
    ['a folder, for writing', () => HostFile.open(folder, { readOnly: false }), 'EISDIR', 'a directory'],
    ['a terminal or the like', () => HostFile.open('/dev/null', { readOnly: false }), 'EINVAL', 'neither a file nor'],
    ['a path through a file', () => HostFile.open('/dev/null/x', { readOnly: true }), 'ENOTDIR', 'not a directory'],
  ])('%s', (_what, open, errno, words) => {
    const failure = failureOf(open);
    expect(failure.errno).toBe(errno);
    expect(failure.message).toContain(words);
    expect(failure.message).toMatch(/'.+'/);
  });

  it('a named pipe is refused at once instead of being waited for', () => {
    const pipe = join(folder, 'pipe');
    execFileSync('mkfifo', [pipe]);
    expect(failureOf(() => HostFile.open(pipe, { readOnly: true })).errno).toBe('EINVAL');
    expect(failureOf(() => HostFile.open(pipe, { readOnly: false })).errno).toBe('EINVAL');
  });

  it('`new` refuses what exists and leaves it as it is; `missing` opens it', () => {
    const path = freshPath();
    writeFileSync(path, 'old');
    expect(failureOf(() => HostFile.open(path, { readOnly: false, create: 'new' })).errno).toBe('EEXIST');
    using file = HostFile.open(path, { readOnly: false, create: 'missing' });
    expect(file.size()).toBe(3);
    using made = HostFile.open(freshPath(), { readOnly: false, create: 'missing' });
    expect(made.size()).toBe(0);
  });

  it('writing to a file opened read-only fails, naming it', () => {
    const path = freshPath();
    writeFileSync(path, 'old');
    using file = HostFile.open(path, { readOnly: true });
    const failure = failureOf(() => file.write(Uint8Array.of(1), 0, 1, 0));
    expect(failure.errno).toBe('EBADF');
    expect(failure.message).toContain(path);
    expect(failureOf(() => file.truncate(0)).message).toContain(path);
    expect(failureOf(() => file.punch(0, 1)).message).toContain(path);
    file.flush();
    expect(statSync(path).size).toBe(3);
  });
});

describe.skipIf(process.platform !== 'linux' || process.getuid?.() !== 0)('with root on Linux', () => {
  /** A file system of 1 MiB, unmounted afterwards. */
  function withTinyFileSystem(action: (mountpoint: string) => void): void {
    const mountpoint = join(folder, 'tiny');
    mkdirSync(mountpoint, { recursive: true });
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', mountpoint]);
    try {
      action(mountpoint);
    } finally {
      execFileSync('umount', [mountpoint]);
    }
  }

  it('a full host disk is ENOSPC, in words and with the path', () => {
    withTinyFileSystem((mountpoint) => {
      using file = HostFile.open(join(mountpoint, 'a.raw'), { readOnly: false, create: 'new' });
      const failure = failureOf(() => file.write(new Uint8Array(4 * MIB).fill(1), 0, 4 * MIB, 0));
      expect(failure.errno).toBe('ENOSPC');
      expect(failure.message).toBe(
        `cannot write 4194304 bytes at 0x0 of '${mountpoint}/a.raw': the host disk is full (ENOSPC)`,
      );
    });
  });

  it('a disk device has the size of the device, and keeps it', () => {
    const backing = freshPath();
    writeFileSync(backing, new Uint8Array(MIB).fill(1));
    const device = execFileSync('losetup', ['--find', '--show', backing], { encoding: 'utf8' }).trim();
    try {
      using file = HostFile.open(device, { readOnly: false });
      expect(file.size()).toBe(MIB);
      expect(file.allocatedBytes()).toBe(MIB);
      expect([file.nextData(4096), file.nextHole(4096), file.nextData(MIB)]).toEqual([4096, MIB, -1]);
      file.truncate(4096);
      expect(file.size()).toBe(MIB);
      expect(failureOf(() => file.truncate(2 * MIB)).errno).toBe('ENOSPC');
      expect(file.punch(8192, 4096)).toBe(true);
      const target = new Uint8Array(2).fill(9);
      file.read(target, 0, 2, 8191);
      expect([...target]).toEqual([1, 0]);
      file.flush();
    } finally {
      execFileSync('losetup', ['--detach', device]);
    }
  });
});
