import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { errnoNumber } from '../../src/os/errno.ts';
import { systemCall } from '../../src/os/library.ts';

describe('a system call', () => {
  it('that the C library does not have is -ENOSYS, as one that the kernel does not have', () => {
    expect(systemCall('int no_such_call(int fd)')(1)).toBe(-errnoNumber('ENOSYS'));
  });

  it('with a prototype that cannot be is our bug, not a failure of the host', () => {
    expect(() => systemCall('no_such_type getpid()')()).toThrow('no_such_type');
  });
});

describe('without koffi', () => {
  beforeEach(() => {
    vi.resetModules();
    vi.doMock('node:module', () => ({
      createRequire: () => () => {
        throw new Error("Cannot find module 'koffi'\nRequire stack: …");
      },
    }));
  });
  afterEach(() => {
    vi.doUnmock('node:module');
    vi.resetModules();
  });

  it('what needs it fails with one clear sentence', async () => {
    const { lockImage } = await import('../../src/storage/image-lock.ts');
    expect(() => lockImage(0, 'a.qcow2', 'read')).toThrow(
      expect.objectContaining({
        errno: 'ENOTSUP',
        message:
          "the C library cannot be called: koffi did not load (Cannot find module 'koffi'); run npm install again",
      }),
    );
  });

  it('files are read and written, and taken to have no holes', async () => {
    const { HostFile } = await import('../../src/storage/host-file.ts');
    const folder = mkdtempSync(join(tmpdir(), 'vdskfs-library-'));
    writeFileSync(join(folder, 'a'), 'hello');
    {
      using file = HostFile.open(join(folder, 'a'), { readOnly: false });
      file.truncate(1_000_000);
      expect(file.punch(0, 4096)).toBe(false);
      expect([file.nextData(0), file.nextData(500_000), file.nextData(1_000_000)]).toEqual([0, 500_000, -1]);
      expect(file.nextHole(0)).toBe(1_000_000);
      const target = new Uint8Array(5);
      file.read(target, 0, 5, 0);
      expect(Buffer.from(target).toString()).toBe('hello');
    }
    rmSync(folder, { recursive: true });
  });
});
