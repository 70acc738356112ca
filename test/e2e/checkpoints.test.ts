/** The main job: a disk with partitions and file systems, checkpointed, damaged, looked at, copied out, rolled back. */
import { cp, mkdir, open, readdir, readFile, rename, rm, rmdir, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { startServer, vdskfs, withFileSystem, withLoop, withMount } from './mount.ts';
import { runOk, withDirectory } from './run.ts';

/** Every program must agree, at every step, also while the image is mounted. */
const checked = (image: string): Promise<string> => runOk('qemu-img', ['check', '-U', image]);

const errno = (code: string) => expect.objectContaining({ code });

describe('a checkpoint', () => {
  it('brings a file system back: GPT and ext4, loop mounts, copy, roll back, qemu-img check at every step', async () => {
    await withDirectory(async (directory) => {
      const image = join(directory, 'vm1.qcow2');
      await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '512M']);
      await withMount(image, {}, async ({ path }) => {
        await runOk('sgdisk', ['--new=1:2048:+64M', '--new=2:0:0', path('vm1', 'disk.raw')]);
        expect(await readdir(path('vm1', 'partitions'))).toEqual(['1.raw', '2.raw']);
        await runOk('mkfs.ext4', ['-q', '-F', path('vm1', 'partitions', '2.raw')]);
        await checked(image);

        const text = 'kept by the checkpoint\n'.repeat(5000);
        await withLoop(path('vm1', 'partitions', '2.raw'), {}, (device) =>
          withFileSystem(device, 'rw', async (files) => {
            await mkdir(join(files, 'etc'));
            for (let index = 0; index < 20; index++) await writeFile(join(files, 'etc', `f${index}`), text);
            await runOk('sync', ['-f', files]);
            await mkdir(path('vm1', 'snapshots', 'before'));
            await checked(image);
            await rm(join(files, 'etc'), { recursive: true });
            await writeFile(join(files, 'later'), 'written after it');
          }),
        );
        await runOk('e2fsck', ['-fn', path('vm1', 'partitions', '2.raw')]);
        await checked(image);

        // The journal of a mounted file system is not empty: replay it on a copy-free, read-only look without it.
        await withLoop(path('vm1', 'snapshots', 'before', 'partitions', '2.raw'), { readOnly: true }, (device) =>
          withFileSystem(device, 'ro,noload', async (files) => {
            expect((await readdir(join(files, 'etc'))).length).toBe(20);
            expect(await readFile(join(files, 'etc', 'f7'), 'utf8')).toBe(text);
            expect(await readdir(files)).not.toContain('later');
          }),
        );

        const copy = join(directory, 'copy.raw');
        await runOk('cp', ['--sparse=always', path('vm1', 'snapshots', 'before', 'disk.raw'), copy]);
        await runOk('cmp', [copy, path('vm1', 'snapshots', 'before', 'disk.raw')]);
        expect((await stat(copy)).blocks * 512).toBeLessThan(64 * 2 ** 20);

        await writeFile(path('vm1', 'control'), 'rollback before\n');
        await checked(image);
        await runOk('cmp', [copy, path('vm1', 'disk.raw')]);
        await withLoop(path('vm1', 'partitions', '2.raw'), {}, (device) =>
          withFileSystem(device, 'rw', async (files) => {
            expect((await readdir(join(files, 'etc'))).length).toBe(20);
          }),
        );
        await rmdir(path('vm1', 'snapshots', 'before'));
        await checked(image);
      });
      await runOk('qemu-img', ['check', image]);
    });
  });

  it('shows logical partitions of an MBR, with file systems that fsck finds nothing wrong in', async () => {
    await withDirectory(async (directory) => {
      const image = join(directory, 'vm1.qcow2');
      await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '256M']);
      await withMount(image, {}, async ({ path }) => {
        const disk = path('vm1', 'disk.raw');
        const parts =
          'mklabel msdos mkpart primary 1MiB 65MiB mkpart extended 65MiB 100% mkpart logical 66MiB 130MiB mkpart logical 131MiB 200MiB';
        await runOk('parted', ['-s', disk, ...parts.split(' ')]);
        expect(await readdir(path('vm1', 'partitions'))).toEqual(['1.raw', '5.raw', '6.raw']);
        for (const name of ['1.raw', '5.raw', '6.raw']) {
          await runOk('mkfs.vfat', [path('vm1', 'partitions', name)]);
          await runOk('fsck.vfat', ['-n', path('vm1', 'partitions', name)]);
        }
        await mkdir(path('vm1', 'snapshots', 'three'));
        expect(await readdir(path('vm1', 'snapshots', 'three', 'partitions'))).toEqual(['1.raw', '5.raw', '6.raw']);
        await runOk('fsck.vfat', ['-n', path('vm1', 'snapshots', 'three', 'partitions', '6.raw')]);
      });
      await runOk('qemu-img', ['check', image]);
    });
  });

  it('gives its space back when it is deleted', async () => {
    await withDirectory(async (directory) => {
      const image = join(directory, 'vm1.qcow2');
      await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '256M']);
      const fill = (disk: string, pattern: string): Promise<string> =>
        runOk('dd', [
          'if=/dev/urandom',
          `of=${disk}`,
          'bs=1M',
          'count=64',
          'conv=notrunc,fsync',
          'status=none',
          pattern,
        ]);
      await withMount(image, {}, async ({ path }) => {
        await fill(path('vm1', 'disk.raw'), 'seek=0');
        const before = (await stat(image)).blocks;
        await mkdir(path('vm1', 'snapshots', 'a'));
        await fill(path('vm1', 'disk.raw'), 'seek=0');
        expect((await stat(image)).blocks).toBeGreaterThan(before + (60 * 2 ** 20) / 512);
        await rmdir(path('vm1', 'snapshots', 'a'));
        expect((await stat(image)).blocks).toBeLessThan(before + (4 * 2 ** 20) / 512);
        await checked(image);
      });
    });
  });

  it('can be deleted on a host that is full: the newest always, the others then', async () => {
    await withDirectory(async (directory) => {
      const small = join(directory, 'small');
      await mkdir(small);
      await runOk('mount', ['-t', 'tmpfs', '-o', 'size=32m', 'tmpfs', small]);
      try {
        const image = join(small, 'vm1.qcow2');
        await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M']);
        await withMount(image, {}, async ({ path }) => {
          const live = path('vm1', 'disk.raw');
          const firstByteOf = async (file: string): Promise<number | undefined> => (await readFile(file))[0];
          const write = async (byte: number): Promise<void> => {
            await using disk = await open(live, 'r+');
            await disk.write(Buffer.alloc(4 << 20, byte), 0, 4 << 20, 0);
            await disk.sync();
          };
          for (const [index, name] of ['old', 'middle', 'new'].entries()) {
            await write(index + 1);
            await mkdir(path('vm1', 'snapshots', name));
          }
          await write(4);
          await expect(writeFile(join(small, 'filler'), Buffer.alloc(32 << 20))).rejects.toEqual(errno('ENOSPC'));
          await expect(runOk('dd', ['if=/dev/zero', `of=${join(small, 'rest')}`, 'bs=4k'])).rejects.toThrow(/No space/);

          await expect(mkdir(path('vm1', 'snapshots', 'more'))).rejects.toEqual(errno('ENOSPC'));
          await expect(rmdir(path('vm1', 'snapshots', 'old'))).rejects.toEqual(errno('ENOSPC'));
          const sentence = await readFile(path('vm1', 'control'), 'utf8');
          expect(sentence).toMatch(/full.*the newest checkpoint, "new", can be deleted all the same\n$/);
          await checked(image);

          await rmdir(path('vm1', 'snapshots', 'new'));
          await checked(image);
          await rmdir(path('vm1', 'snapshots', 'old'));
          expect(await readdir(path('vm1', 'snapshots'))).toEqual(['middle']);
          expect(await firstByteOf(path('vm1', 'snapshots', 'middle', 'disk.raw'))).toBe(2);
          expect(await firstByteOf(live)).toBe(4);
          await checked(image);
        });
        await runOk('qemu-img', ['check', image]);
      } finally {
        await runOk('umount', [small]);
      }
    });
  });

  it('is refused under a name that is taken, and keeps while one of its files is open', async () => {
    await withDirectory(async (directory) => {
      const image = join(directory, 'vm1.qcow2');
      await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M']);
      await withMount(image, {}, async ({ path }) => {
        const checkpoint = path('vm1', 'snapshots', 'a');
        await mkdir(checkpoint);
        await expect(mkdir(checkpoint)).rejects.toEqual(errno('EEXIST'));
        const held = await open(join(checkpoint, 'disk.raw'), 'r');
        try {
          await expect(rmdir(checkpoint)).rejects.toEqual(errno('EBUSY'));
          expect(await readFile(path('vm1', 'control'), 'utf8')).toMatch(/open/);
        } finally {
          await held.close();
        }
        await rename(checkpoint, path('vm1', 'snapshots', 'b'));
        await expect(writeFile(path('vm1', 'snapshots', 'b', 'disk.raw'), 'x')).rejects.toEqual(errno('EROFS'));
        await expect(mkdir(path('vm1', 'elsewhere'))).rejects.toEqual(errno('EPERM'));
        await rmdir(path('vm1', 'snapshots', 'b'));
        expect(await readdir(path('vm1', 'snapshots'))).toEqual([]);
      });
    });
  });

  it.each(['0.10', '1.1'])(
    'survives kill -9 of the server (compat %s), and the next mount leaves no leak',
    async (compat) => {
      await withDirectory(async (directory) => {
        const image = join(directory, 'vm1.qcow2');
        const mountpoint = join(directory, 'mnt');
        await mkdir(mountpoint);
        await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', `compat=${compat}`, image, '128M']);
        const tree = await startServer([image], mountpoint, {});
        const write = (seek: number): Promise<string> =>
          runOk('dd', [
            'if=/dev/urandom',
            `of=${tree.path('vm1', 'disk.raw')}`,
            'bs=64k',
            'count=200',
            `seek=${seek}`,
            'conv=notrunc',
            'status=none',
          ]);
        try {
          await write(0);
          await mkdir(tree.path('vm1', 'snapshots', 'whole'));
          await cp(tree.path('vm1', 'snapshots', 'whole', 'disk.raw'), join(directory, 'whole.raw'));
          await write(0);
          await write(700);
          tree.signal('SIGKILL');
          await tree.ended;
          await expect(stat(mountpoint)).rejects.toEqual(errno('ENOTCONN'));
          const again = await vdskfs(['mount', image, mountpoint]);
          expect(again.status).toBe(1);
          expect(again.stderr).toMatch(/died.*unmount/);
        } finally {
          await vdskfs(['unmount', mountpoint]);
        }
        await withMount(image, { mountpoint }, async ({ path }) => {
          await runOk('cmp', [join(directory, 'whole.raw'), path('vm1', 'snapshots', 'whole', 'disk.raw')]);
        });
        await runOk('qemu-img', ['check', image]);
      });
    },
  );
});

describe('two sides of a lock', () => {
  it('QEMU opens nothing that is mounted for writing, and vdskfs nothing that QEMU writes', async () => {
    await withDirectory(async (directory) => {
      const image = join(directory, 'vm1.qcow2');
      await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M']);
      await withMount(image, {}, async () => {
        await expect(runOk('qemu-io', ['-c', 'read 0 512', image])).rejects.toThrow(/lock/);
      });
      await withMount(image, { args: ['--read-only'] }, async () => {
        await runOk('qemu-io', ['-r', '-c', 'read 0 512', image]);
        await expect(runOk('qemu-io', ['-c', 'write 0 512', image])).rejects.toThrow(/lock/);
      });
    });
  });
});
