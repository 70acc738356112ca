import { describe, expect, it } from 'vitest';
import { FsError } from '../../../src/errors.ts';
import {
  checkPathLength,
  dialects,
  type Generation,
  restorePathBytesMax,
  streamGenerations,
} from '../../../src/guest/bhyve/generation.ts';
import { decodeNvlist } from '../../../src/guest/bhyve/nvlist.ts';

const request = { directory: '/mnt/vm1/.incoming/1', name: 'state', suspend: false };
const path = '/mnt/vm1/.incoming/1/state';

describe('struct messages', () => {
  it.each([
    ['A', 104],
    ['B', 1028],
  ] as const)('generation %s: %i bytes, the operation, the path, zeros to the end', (generation, bytes) => {
    const message = Buffer.from(dialects[generation].encode(request));
    expect(message).toHaveLength(bytes);
    expect(message.readUInt32LE(0)).toBe(0);
    expect(message.subarray(4, 4 + path.length).toString()).toBe(path);
    expect(message.subarray(4 + path.length).every((byte) => byte === 0)).toBe(true);
    expect(Buffer.from(dialects[generation].encode({ ...request, suspend: true })).readUInt32LE(0)).toBe(1);
  });
});

describe('list messages', () => {
  it.each([
    ['C', path, false],
    ['D', 'state', true],
    ['either', path, true],
  ] as const)('generation %s names the file %s', (generation, filename, passesDirectory) => {
    for (const suspend of [false, true]) {
      const list = decodeNvlist(dialects[generation].encode({ ...request, suspend }));
      expect(Object.fromEntries(list)).toEqual({
        cmd: 'checkpoint',
        filename,
        suspend,
        ...(passesDirectory ? { fddir: { descriptor: 0 } } : {}),
      });
    }
    expect(dialects[generation].passesDirectory).toBe(passesDirectory);
  });

  it('always have the command as a string: the newest bhyve dies without it', () => {
    for (const generation of ['C', 'D', 'either'] as const) {
      expect(decodeNvlist(dialects[generation].encode(request)).get('cmd')).toBe('checkpoint');
    }
  });
});

describe('the path of the state file', () => {
  it.each([
    ['A', 95],
    ['B', 95],
    ['C', 250],
    ['either', 250],
  ] as const)('generation %s takes %i bytes of it and not one more', (generation, max) => {
    const directory = `/${'d'.repeat(max - 7)}`;
    checkPathLength(generation, { ...request, directory });
    expect(() => checkPathLength(generation, { ...request, directory: `${directory}d` })).toThrow(
      new FsError('ENAMETOOLONG', '').constructor as typeof FsError,
    );
    expect(() => checkPathLength(generation, { ...request, directory: `${directory}d` })).toThrow(
      `at most ${max} bytes`,
    );
  });

  it('counts bytes, not letters', () => {
    expect(() => checkPathLength('A', { ...request, directory: `/${'ü'.repeat(50)}` })).toThrow('107');
  });

  it('may be any for a generation that gets the folder', () => {
    checkPathLength('D', { ...request, directory: `/${'d'.repeat(1000)}` });
  });
});

describe('by the release of the host', () => {
  it.each<[number | undefined, Generation[]]>([
    [1_301_000, ['C']],
    [1_302_001, ['C']],
    [1_399_999, ['C']],
    [1_400_000, ['D']],
    [1_500_000, ['D']],
    [undefined, ['either', 'D', 'C']],
  ])('%s: a stream socket is asked as %j', (release, generations) => {
    expect(streamGenerations(release)).toEqual(generations);
  });

  it.each([
    [1_300_139, 95],
    [1_302_001, 250],
    [1_400_000, 250],
    [undefined, 250],
  ])('%s: bhyve -r takes a path of %i bytes', (release, max) => {
    expect(restorePathBytesMax(release)).toBe(max);
  });
});
