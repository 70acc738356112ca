import { mkdir, symlink } from 'node:fs/promises';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { errorIn, findControlSocket } from '../../../src/guest/bhyve/control-socket.ts';
import { encodeNvlist, type NvValue } from '../../../src/guest/bhyve/nvlist.ts';
import { withDirectory } from '../../e2e/run.ts';

describe('the answer of a bhyve that answers', () => {
  const answer = (...entries: [string, NvValue][]): Uint8Array => encodeNvlist(new Map(entries));

  it.each([
    ['nothing', new Uint8Array(0), undefined],
    ['an empty list', answer(), undefined],
    ['a list that says something else', answer(['result', 'done']), undefined],
    ['an error', answer(['error', 'no such device']), 'no such device'],
    ['an error that is no text', answer(['error', 5n]), undefined],
    ['half a list', answer(['error', 'x']).slice(0, -1), undefined],
    ['nonsense', Buffer.from('nonsense'), undefined],
  ])('%s', (_what, bytes, error) => {
    expect(errorIn(bytes)).toBe(error);
  });
});

describe('the control socket', () => {
  const listening = async (path: string, body: () => Promise<void>): Promise<void> => {
    let connections = 0;
    const server = createServer(() => {
      connections += 1;
    });
    await new Promise<void>((resolve) => server.listen(path, resolve));
    try {
      await body();
    } finally {
      await new Promise((resolve) => server.close(resolve));
    }
    expect(connections).toBe(0);
  };

  it('is found without a connection to it, also when bound under another name of its folder', () =>
    withDirectory(async (directory) => {
      const real = join(directory, 'run');
      const alias = join(directory, 'var-run');
      await mkdir(join(real, 'checkpoint'), { recursive: true });
      await symlink('run', alias);
      expect(await findControlSocket(alias, 'web0', undefined)).toBeUndefined();
      await listening(join(real, 'web0'), async () => {
        for (const folder of [real, alias]) {
          expect(await findControlSocket(folder, 'web0', 1_400_097)).toEqual({
            path: join(folder, 'web0'),
            generations: ['D'],
          });
        }
        expect(await findControlSocket(real, 'web1', 1_400_097)).toBeUndefined();
      });
      await listening(join(real, 'checkpoint', 'web0'), async () => {
        expect(await findControlSocket(alias, 'web0', undefined)).toEqual({
          path: join(alias, 'checkpoint', 'web0'),
          generations: ['A'],
        });
      });
    }));
});
