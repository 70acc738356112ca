import { describe, expect, it } from 'vitest';
import { formatTable, printable } from '../../src/cli/table.ts';

describe('a table', () => {
  const columns = [
    { head: 'NAME', align: 'left' },
    { head: 'SIZE', align: 'right' },
    { head: 'WHAT', align: 'left' },
  ] as const;

  it('is as wide as its widest cells, without spaces at the end of a line', () => {
    expect(
      formatTable(columns, [
        ['before-upgrade', '1 GiB', 'x'],
        ['a', '10 GiB', ''],
      ]),
    ).toBe('NAME              SIZE  WHAT\nbefore-upgrade   1 GiB  x\na               10 GiB\n');
  });

  it('has its heads alone when there are no rows', () => {
    expect(formatTable(columns, [])).toBe('NAME  SIZE  WHAT\n');
  });

  it('counts characters, not bytes', () => {
    expect(formatTable(columns, [['müde😀', '1', 'x']])).toBe('NAME   SIZE  WHAT\nmüde😀     1  x\n');
  });
});

it('a name with control characters cannot write to the terminal', () => {
  expect(printable('a\x1b[31m\nb\x7f')).toBe('a\\x1b[31m\\x0ab\\x7f');
});
