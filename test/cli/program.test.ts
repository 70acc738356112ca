import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Command, CommanderError } from 'commander';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { createProgram } from '../../src/cli/program.ts';

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'vdskfs-program-'));
});
afterEach(() => rmSync(directory, { recursive: true }));

/** Run a command line in this process, keeping what commander prints. */
async function parse(...args: string[]): Promise<{ error: Error | undefined; out: string; err: string }> {
  const program = createProgram();
  let [out, err] = ['', ''];
  const keep = (command: Command): void => {
    command.configureOutput({ writeOut: (text) => (out += text), writeErr: (text) => (err += text) });
    command.commands.forEach(keep);
  };
  keep(program);
  try {
    await program.parseAsync(args, { from: 'user' });
    return { error: undefined, out, err };
  } catch (error) {
    return { error: error as Error, out, err };
  }
}

const commands = createProgram().commands.map((command) => command.name());

it('has the commands of the contract', () => {
  expect(commands).toEqual([
    'mount',
    'unmount',
    'status',
    'create',
    'info',
    'ls',
    'checkpoint',
    'delete',
    'rename',
    'rollback',
    'restore',
    'export',
    'diff',
    'space',
    'resize',
    'compact',
    'check',
    'merge',
    'rebase',
    'completion',
  ]);
});

describe('--help', () => {
  it.each(commands)('of %s shows an example', async (command) => {
    const { error, out } = await parse(command, '--help');
    expect((error as CommanderError).exitCode).toBe(0);
    expect(out).toMatch(new RegExp(`Examples?:\\n  \\$ .*vdskfs ${command}`));
  });
});

describe('wrong usage', () => {
  it.each([
    ['an unknown command', ['frobnicate'], "vdskfs: unknown command 'frobnicate'"],
    ['an unknown option', ['info', '--frobnicate', 'a.qcow2'], "vdskfs: unknown option '--frobnicate'"],
    ['a missing argument', ['checkpoint', 'a.qcow2'], "vdskfs: missing required argument 'name'"],
    ['one argument too many', ['unmount', 'a', 'b'], 'vdskfs: too many arguments'],
    ['no size', ['create', 'a.qcow2'], 'vdskfs: give a size, or --backing to take its size'],
    ['a size that is none', ['create', 'a.qcow2', 'big'], 'Give a size such as 10G'],
    [
      'a backing format without backing file',
      ['create', 'a.qcow2', '1G', '--backing-format', 'raw'],
      '--backing-format goes with',
    ],
    ['a raw data file without name', ['create', 'a.qcow2', '1G', '--data-file-raw'], '--data-file-raw goes with'],
    ['a mount without mountpoint', ['mount', 'a.qcow2'], 'vdskfs: give at least one image or folder, and last'],
    ['no threads', ['mount', '--threads', '0', 'a.qcow2', '/mnt'], 'Give a whole number of at least 1.'],
    ['an unknown driver', ['mount', '--driver', 'x', 'a.qcow2', '/mnt'], 'Allowed choices are native, fuse-native.'],
    ['a raw export of what changed', ['export', 'a.qcow2', 'b.raw', '--since', 'x'], '--since goes with qcow2'],
    ['a compressed raw export', ['export', 'a.qcow2', 'b.raw', '--compress', 'zlib'], '--compress goes with qcow2'],
    ['a rebase to nowhere', ['rebase', 'a.qcow2'], "required option '--backing <file>' not specified"],
    ['an unknown shell', ['completion', 'csh'], 'Allowed choices are bash, zsh, fish.'],
  ])('%s is said on standard error', async (_rule, args, sentence) => {
    const { error, out, err } = await parse(...args);
    expect(error?.constructor.name).toMatch(/CommanderError|InvalidArgumentError/);
    expect((error as CommanderError).exitCode).not.toBe(0);
    expect(err).toContain(sentence);
    expect(err).toMatch(/^vdskfs: /);
    expect(out).toBe('');
  });
});

describe('an image or a disk', () => {
  it('is never a directory of another kind', async () => {
    mkdirSync(join(directory, 'vm1'));
    for (const args of [
      ['checkpoint', join(directory, 'vm1'), 'a'],
      ['info', join(directory, 'vm1')],
    ]) {
      expect((await parse(...args)).error?.message).toContain('a directory, but not one of a mounted disk');
    }
  });
});
