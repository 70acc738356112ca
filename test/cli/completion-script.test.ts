import { spawnSync } from 'node:child_process';
import { describe, expect, it } from 'vitest';
import { completionScript, shells } from '../../src/cli/completion-script.ts';
import { createProgram } from '../../src/cli/program.ts';

const program = createProgram();
const commands = program.commands.map((command) => command.name());

describe.each(shells)('the completion for %s', (shell) => {
  const script = completionScript(shell, program);

  it('knows every command', () => {
    for (const command of commands) expect(script).toContain(command);
  });

  it('knows options, and the words that some of them take', () => {
    expect(script).toContain('cluster-size');
    expect(script).toContain('fuse-native');
    expect(script).toContain('metadata');
  });
});

/** What bash offers for the last of `words`. */
function offered(...words: string[]): string[] {
  const script = `${completionScript('bash', program)}
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _vdskfs; printf '%s\\n' "\${COMPREPLY[@]}"`;
  const { stdout, stderr } = spawnSync('bash', ['-c', script, '-', ...words], { encoding: 'utf8' });
  expect(stderr).toBe('');
  return stdout.split('\n').filter((word) => word !== '');
}

describe('bash offers', () => {
  it('commands first', () => {
    expect(offered('vdskfs', 'ren')).toEqual(['rename']);
  });

  it("a command's own options", () => {
    expect(offered('vdskfs', 'create', '--data')).toEqual(['--data-file', '--data-file-raw']);
  });

  it('the choices of an option', () => {
    expect(offered('vdskfs', 'mount', '--driver', '')).toEqual(['native', 'fuse-native']);
  });

  it('the choices of an argument', () => {
    expect(offered('vdskfs', 'completion', 'z')).toEqual(['zsh']);
  });

  it('files elsewhere', () => {
    expect(offered('vdskfs', 'info', 'package.')).toEqual(['package.json']);
  });
});
