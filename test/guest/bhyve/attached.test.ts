import { chmod, mkdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterEach, expect, it, vi } from 'vitest';
import { openBhyveGuest } from '../../../src/guest/bhyve/bhyve-guest.ts';
import { withDirectory } from '../../e2e/run.ts';

afterEach(() => vi.unstubAllEnvs());

it("checkpoints of a bhyve with libvdsk go out as the project's documentation has them", () =>
  withDirectory(async (directory) => {
    const log = join(directory, 'log');
    const program = join(directory, 'bin', 'bhyvectl');
    await mkdir(join(directory, 'bin'));
    await writeFile(program, `#!/bin/sh\nfor word; do printf '[%s]' "$word"; done >>'${log}'\necho >>'${log}'\n`);
    await chmod(program, 0o755);
    vi.stubEnv('PATH', `${join(directory, 'bin')}:${process.env.PATH}`);
    vi.stubEnv('VDSKFS_BHYVE_RUNDIR', undefined);

    expect(openBhyveGuest({ name: 'web0' }).attached).toBeUndefined();
    const { attached } = openBhyveGuest({ name: 'web0', attached: true });
    await attached?.take('internal', 'before upgrade');
    await attached?.delete('internal', '-r', () => {});
    await attached?.take('external', 'nightly');
    await attached?.delete('external', 'nightly', () => {});
    expect((await readFile(log, 'utf8')).trimEnd().split('\n')).toEqual([
      '[--checkpoint][before upgrade][--vm=web0]',
      '[--del-checkpoint][-r][--vm=web0]',
      '[--ext-checkpoint][nightly][--vm=web0]',
      '[--del-ext-checkpoint][nightly][--vm=web0]',
    ]);

    await writeFile(program, '#!/bin/sh\necho "bhyvectl: unrecognized option" >&2\nexit 1\n');
    await expect(attached?.take('external', 'x')).rejects.toMatchObject({ errno: 'ENOTSUP' });
    await writeFile(
      program,
      '#!/bin/sh\necho "vm_open: web0 could not be opened: No such file or directory" >&2\nexit 1\n',
    );
    await expect(attached?.take('internal', 'x')).rejects.toMatchObject({ errno: 'ENOTCONN' });
    await writeFile(program, '#!/bin/sh\necho "the disk is full" >&2\nexit 28\n');
    await expect(attached?.take('internal', 'x')).rejects.toMatchObject({
      errno: 'EIO',
      message: expect.stringContaining('the disk is full'),
    });
    await writeFile(program, '#!/bin/sh\nexit 3\n');
    await expect(attached?.take('internal', 'x')).rejects.toThrow('exit status 3');
  }));
