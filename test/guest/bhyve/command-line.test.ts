import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { deviceArguments, hasBootRom, shellWords, withRestore } from '../../../src/guest/bhyve/command-line.ts';

describe('-r put into a command line', () => {
  it.each([
    ['bhyve -c 2 web0', 'bhyve -r S -c 2 web0'],
    ['bhyve -r old -c 2 web0', 'bhyve -r S -c 2 web0'],
    ['bhyve -c 2 -rold web0', 'bhyve -r S -c 2 web0'],
    ['bhyve -AHPr old web0', 'bhyve -r S -AHP web0'],
    ['bhyve -AHrold web0', 'bhyve -r S -AH web0'],
    ['bhyve -c2 -m 4G web0', 'bhyve -r S -c2 -m 4G web0'],
    // A value that looks like the option, and a guest that is called so.
    ['bhyve -s -r web0', 'bhyve -r S -s -r web0'],
    ['bhyve -c 2 web0 -r', 'bhyve -r S -c 2 web0 -r'],
    ['bhyve -c 2 -- -r', 'bhyve -r S -c 2 -- -r'],
    ['/usr/sbin/bhyve web0', '/usr/sbin/bhyve -r S web0'],
    ['bhyve -k web0.conf web0', 'bhyve -r S -k web0.conf web0'],
    // The last option lacks its value: nothing is made up for it.
    ['bhyve -c', 'bhyve -r S -c'],
    ['', 'bhyve -r S'],
  ])('%s', (before, after) => {
    const words = (text: string): string[] => (text === '' ? [] : text.split(' '));
    expect(withRestore(words(before), 'S')).toEqual(words(after));
  });

  it('twice is the same as once', () => {
    const word = fc.constantFrom('-A', '-r', '-c', '2', '-s', '3,virtio-blk,/d', '-AHr', 'web0', '--', '-');
    fc.assert(
      fc.property(fc.array(word), (words) => {
        const once = withRestore(['bhyve', ...words], 'S');
        expect(withRestore(once, 'S')).toEqual(once);
      }),
    );
  });
});

it('devices are the values of -s', () => {
  const argv = [
    'bhyve',
    '-A',
    '-s',
    '0,hostbridge',
    '-Hs',
    '3,virtio-blk,/d',
    '-s31,lpc',
    '-l',
    'com1,stdio',
    'web0',
    '-s',
    'x',
  ];
  expect(deviceArguments(argv)).toEqual(['0,hostbridge', '3,virtio-blk,/d', '31,lpc']);
});

it.each([
  [['bhyve', '-l', 'bootrom,/fw.fd', 'web0'], true],
  [['bhyve', '-o', 'bootrom=/fw.fd', 'web0'], true],
  [['bhyve', '-l', 'com1,stdio', 'web0'], false],
])('a boot ROM in %j: %s', (argv, expected) => {
  expect(hasBootRom(argv)).toBe(expected);
});

describe('words of a shell', () => {
  it.each([
    ['bhyve -c 2  web0 ', ['bhyve', '-c', '2', 'web0']],
    [`bhyve -s '3,virtio-blk,/a b' "x y"`, ['bhyve', '-s', '3,virtio-blk,/a b', 'x y']],
    [String.raw`a\ b "c\"d" 'e\f'`, ['a b', 'c"d', String.raw`e\f`]],
    [String.raw`"a\nb"`, [String.raw`a\nb`]],
    [`one'two'"three"`, ['onetwothree']],
    [`''`, ['']],
    ['a # comment', ['a']],
    ['a#b', ['a#b']],
    ['a \\\n b', ['a', 'b']],
    ['', []],
  ])('%j', (text, words) => {
    expect(shellWords(text)).toEqual(words);
  });

  it.each([`a 'b`, `a "b`, 'a\\'])('%j leaves something open', (text) => {
    expect(() => shellWords(text)).toThrow('open');
  });
});
