import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { parseGuestConfig, readGuestConfig } from '../../../src/guest/bhyve/guest-config.ts';
import { withDirectory } from '../../e2e/run.ts';

describe('--guest-config', () => {
  it.each([
    ['a command line', 'bhyve -c 2 -m 4G web0\n', ['bhyve', '-c', '2', '-m', '4G', 'web0']],
    [
      'a script',
      `#!/bin/sh
# starts bhyve as it should be
set -eu
bhyveload -m 4G -d /disk.raw web0
/usr/sbin/bhyve -c 2 -m 4G \\
  -s 0,hostbridge -s '3,virtio-blk,/the disk.raw' \\
  web0 &
echo started
`,
      ['/usr/sbin/bhyve', '-c', '2', '-m', '4G', '-s', '0,hostbridge', '-s', '3,virtio-blk,/the disk.raw', 'web0'],
    ],
    ['a command line behind another program', 'daemon -f bhyve -H web0', ['bhyve', '-H', 'web0']],
    [
      'a file of bhyve_config(5)',
      '# web0\ncpus=2\nmemory.size=4G\npci.0.3.0.device=virtio-blk\n',
      ['bhyve', '-k', '/etc/web0.conf', 'web0'],
    ],
    ['an empty file', '', ['bhyve', '-k', '/etc/web0.conf', 'web0']],
  ])('%s', (_what, text, argv) => {
    expect(parseGuestConfig(text, '/etc/web0.conf', 'web0')).toEqual(argv);
  });

  it('that is not there is named', () =>
    withDirectory(async (directory) => {
      await expect(readGuestConfig(join(directory, 'none'), 'web0')).rejects.toMatchObject({
        errno: 'ENOENT',
        message: expect.stringContaining('--guest-config'),
      });
      await writeFile(join(directory, 'open'), "bhyve -s 'oh");
      await expect(readGuestConfig(join(directory, 'open'), 'web0')).rejects.toMatchObject({ errno: 'EINVAL' });
    }));
});
