import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type RawName, shownNames, validateNewName } from '../../src/disk/checkpoint-name.ts';
import type { FsError } from '../../src/errors.ts';

const raw = (name: string, id: string): RawName => ({ id, name, nameBytes: Buffer.from(name) });
const errnoOf = (name: string): string | undefined => {
  try {
    validateNewName(name);
    return undefined;
  } catch (error) {
    return (error as FsError).errno;
  }
};

describe('the name of a new checkpoint', () => {
  it.each([
    ['one byte', 'a', undefined],
    ['255 bytes', 'x'.repeat(255), undefined],
    ['255 bytes in multi-byte characters', `${'é'.repeat(127)}e`, undefined],
    ['spaces and control characters', ' a\tb\n\u0001', undefined],
    ['a leading dot', '.hidden', undefined],
    ['looks like an ID', '7', undefined],
    ['empty', '', 'EINVAL'],
    ['.', '.', 'EINVAL'],
    ['..', '..', 'EINVAL'],
    ['with a slash', 'a/b', 'EINVAL'],
    ['with a NUL', 'a\0b', 'EINVAL'],
    ['half a surrogate pair: no UTF-8', 'a\ud800', 'EINVAL'],
    ['256 bytes', 'x'.repeat(256), 'ENAMETOOLONG'],
    ['256 bytes in 128 characters', 'é'.repeat(128), 'ENAMETOOLONG'],
  ])('%s', (_rule, name, errno) => {
    expect(errnoOf(name)).toBe(errno);
  });

  it('is refused with a sentence that says the name and why', () => {
    expect(() => validateNewName('a/b')).toThrow(/"a\/b": that name contains a slash;/);
    expect(() => validateNewName('x'.repeat(70_000))).toThrow(/has 70000 bytes/);
  });
});

describe('the names shown', () => {
  it.each<[string, RawName[], string[]]>([
    ['valid and used once: as it is', [raw('a', '1'), raw('b', '2')], ['a', 'b']],
    ['equal to another ID: as it is', [raw('2', '1'), raw('b', '2')], ['2', 'b']],
    ['used twice: both with their ID', [raw('a', '1'), raw('a', '2'), raw('b', '3')], ['a~1', 'a~2', 'b']],
    ['empty: the ID alone', [raw('', '4')], ['~4']],
    ['.: with its ID', [raw('.', '1'), raw('..', '2')], ['.~1', '..~2']],
    ['with a slash: shown as ∕', [raw('a/b', '1')], ['a∕b~1']],
    ['with a NUL: shown as ␀', [raw('a\0b', '1')], ['a␀b~1']],
    ['256 bytes: cut to leave room for the ID', [raw('x'.repeat(256), '12')], [`${'x'.repeat(246)}~12`]],
    ['cut between characters only', [raw('é'.repeat(200), '12')], [`${'é'.repeat(123)}~12`]],
    [
      'name~ID is a real name already: a number behind',
      [raw('a~1', '9'), raw('a', '1'), raw('a', '1')],
      ['a~1', 'a~1~2', 'a~1~3'],
    ],
    ['a slash in the ID too', [raw('', '../x')], ['~..∕x']],
  ])('%s', (_rule, entries, shown) => {
    expect(shownNames(entries)).toEqual(shown);
  });

  it('marks bytes that are no UTF-8', () => {
    expect(shownNames([{ id: '3', name: 'a\ufffd', nameBytes: Uint8Array.of(0x61, 0xff) }])).toEqual(['a\ufffd~3']);
  });

  it('keeps a name in which U+FFFD is really written', () => {
    expect(shownNames([raw('a\ufffd', '3')])).toEqual(['a\ufffd']);
  });

  it('are valid and unlike each other, whatever the image says', () => {
    const text = fc.oneof(
      fc.constantFrom('', 'a', 'a~1', 'a~1~2', '.', '1'),
      fc.string({ unit: 'binary', maxLength: 300 }),
    );
    fc.assert(
      fc.property(fc.array(fc.record({ id: text, name: text }), { maxLength: 30 }), (entries) => {
        const shown = shownNames(entries.map(({ id, name }) => raw(name, id)));
        expect(shown).toHaveLength(entries.length);
        expect(new Set(shown).size).toBe(entries.length);
        for (const name of shown) expect(errnoOf(name)).toBe(undefined);
      }),
    );
  });

  it('of 65,536 snapshots with one name and one ID are found in one pass', () => {
    const shown = shownNames(Array.from({ length: 65_536 }, () => raw('a', '1')));
    expect(shown.at(-1)).toBe('a~1~65536');
  });
});
