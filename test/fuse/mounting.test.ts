import { closeSync, fstatSync, mkdirSync, mkdtempSync, readSync, rmSync, symlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it, onTestFinished } from 'vitest';
import { listMounts } from '../../src/fuse/mount-list.ts';
import { mountDevice, unmountAndWait, unmountDevice } from '../../src/fuse/mounting.ts';

function directory(): string {
  const path = mkdtempSync(join(tmpdir(), 'vdskfs-mounting-'));
  onTestFinished(() => rmSync(path, { recursive: true }));
  mkdirSync(join(path, 'mnt'));
  return path;
}

const options = { source: 'nothing', readOnly: false, allowOther: false, threads: 1, pollMicroseconds: 0 };

describe('mounting on Linux', () => {
  it.each(['linux-root', 'linux-user'] as const)('as %s gives the descriptor on which INIT waits', async (way) => {
    const mountpoint = join(directory(), 'mnt');
    const fd = await mountDevice({ ...options, mountpoint }, way);
    try {
      expect(fstatSync(fd).isCharacterDevice()).toBe(true);
      const request = Buffer.alloc(2 ** 20 + 4096);
      expect(readSync(fd, request)).toBeGreaterThanOrEqual(56);
      expect(request.readUInt32LE(4)).toBe(26); // INIT
      expect((await listMounts()).find((mount) => mount.mountpoint === mountpoint)).toMatchObject({
        type: 'fuse.vdskfs',
        source: 'nothing',
      });
    } finally {
      await unmountDevice(way, mountpoint);
      closeSync(fd);
    }
    expect((await listMounts()).some((mount) => mount.mountpoint === mountpoint)).toBe(false);
  });

  it('passes on what the mounting program says', async () => {
    const mountpoint = join(directory(), 'absent');
    await expect(mountDevice({ ...options, mountpoint }, 'linux-root')).rejects.toMatchObject({
      errno: 'ENOENT',
      message: expect.stringContaining(mountpoint),
    });
  });

  it('finds a mount through a symbolic link', async () => {
    const base = directory();
    symlinkSync(join(base, 'mnt'), join(base, 'link'));
    const fd = await mountDevice({ ...options, mountpoint: join(base, 'link') }, 'linux-root');
    await unmountDevice('linux-root', join(base, 'link'));
    closeSync(fd);
    expect((await listMounts()).some((mount) => mount.mountpoint === join(base, 'mnt'))).toBe(false);
  });
});

describe('unmounting', () => {
  it('where nothing of ours is mounted does nothing', async () => {
    await unmountDevice('linux-root', '/proc');
    await unmountAndWait('linux-root', join(directory(), 'mnt'), Promise.resolve());
  });
});
