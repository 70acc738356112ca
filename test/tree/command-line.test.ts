import { describe, expect, it } from 'vitest';
import { nameAndOptions, splitCommand, splitWords } from '../../src/tree/command-line.ts';

describe('a command line', () => {
  it.each([
    ['help', 'help', ''],
    ['  status \n', 'status', ''],
    ['checkpoint a b\n', 'checkpoint', 'a b'],
    ['\n', '', ''],
  ])('%j is split behind the first word', (line, command, rest) => {
    expect(splitCommand(line)).toEqual({ command, rest });
  });

  it.each([
    ['before upgrade', 'before upgrade', []],
    ['a --no-memory', 'a', ['--no-memory']],
    ['--no-memory a b', 'a b', ['--no-memory']],
    ['"a --no-memory"', 'a --no-memory', []],
    ['" a "  --no-memory', ' a ', ['--no-memory']],
    ['say "hi"', 'say "hi"', []],
    ['"say \\"hi\\" \\\\ "', 'say "hi" \\ ', []],
    ['--no-memory-at-all', '--no-memory-at-all', []],
    ['""', '', []],
  ])('%s holds one name', (rest, name, options) => {
    const found = nameAndOptions(rest, ['--no-memory']);
    expect([found.name, [...found.options]]).toEqual([name, options]);
  });

  it.each(['"a', '"a" b', '"a"b', '"a\\"'])('%s holds none', (rest) => {
    expect(() => nameAndOptions(rest, [])).toThrow();
  });

  it.each([
    ['a b', ['a', 'b']],
    ['"a b"\t c', ['a b', 'c']],
    ['a"b c', ['a"b', 'c']],
    ['', []],
  ])('%j holds words', (text, words) => {
    expect(splitWords(text)).toEqual(words);
  });
});
