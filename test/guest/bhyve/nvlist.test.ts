import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { FsError } from '../../../src/errors.ts';
import { decodeNvlist, encodeNvlist, type NvValue } from '../../../src/guest/bhyve/nvlist.ts';

/** Bytes as the fact sheet prints them, comments behind two blanks and a word cut off. */
const bytes = (hex: string): Uint8Array => Uint8Array.from(Buffer.from(hex.replace(/\s+/g, ''), 'hex'));

const CHECKPOINT = `
  04 04 00  0b 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  63 6d 64 00  63 68 65 63 6b 70 6f 69 6e 74 00
  04 09 00  04 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  66 69 6c 65 6e 61 6d 65 00  66 6f 6f 00
  02 08 00  01 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  73 75 73 70 65 6e 64 00  00`;
const C = bytes(`6c 00 00  00 00 00 00 00 00 00 00  5e 00 00 00 00 00 00 00 ${CHECKPOINT}`);
const D = bytes(`6c 00 00  01 00 00 00 00 00 00 00  7f 00 00 00 00 00 00 00 ${CHECKPOINT}
  06 06 00  08 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  66 64 64 69 72 00  00 00 00 00 00 00 00 00`);
const E = bytes(`6c 00 00  00 00 00 00 00 00 00 00  1b 00 00 00 00 00 00 00
  04 06 00  02 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  65 72 72 6f 72 00 78 00`);

const examples: [string, Uint8Array, Map<string, NvValue>][] = [
  [
    'a checkpoint without a descriptor',
    C,
    new Map<string, NvValue>([
      ['cmd', 'checkpoint'],
      ['filename', 'foo'],
      ['suspend', false],
    ]),
  ],
  [
    'a checkpoint with one',
    D,
    new Map<string, NvValue>([
      ['cmd', 'checkpoint'],
      ['filename', 'foo'],
      ['suspend', false],
      ['fddir', { descriptor: 0 }],
    ]),
  ],
  ['a failure', E, new Map([['error', 'x']])],
];

describe('the lists that libnv itself was seen to make', () => {
  it.each(examples)('%s is made byte for byte', (_what, message, list) => {
    expect(Buffer.from(encodeNvlist(list)).toString('hex')).toBe(Buffer.from(message).toString('hex'));
  });

  it.each(examples)('%s is read', (_what, message, list) => {
    expect(decodeNvlist(message)).toEqual(list);
  });
});

const name = fc.string({ minLength: 1, maxLength: 40, unit: 'grapheme' }).filter((text) => !text.includes('\0'));
const value: fc.Arbitrary<NvValue> = fc.oneof(
  fc.constant(null),
  fc.boolean(),
  fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
  fc.string({ unit: 'grapheme' }).map((text) => text.replaceAll('\0', '')),
  fc.uint8Array({ minLength: 1, maxLength: 100 }),
);
const lists = fc.array(fc.tuple(name, value), { maxLength: 8 }).map((entries) => new Map(entries));

it('what is encoded is read back', () => {
  fc.assert(
    fc.property(lists, (list) => {
      expect(decodeNvlist(encodeNvlist(list))).toEqual(list);
    }),
  );
});

describe('a hostile list', () => {
  /** D with bytes replaced from `at` on. */
  const spoilt = (at: number, ...replacement: number[]): Uint8Array => {
    const copy = D.slice();
    copy.set(replacement, at);
    return copy;
  };

  it.each([
    ['empty', new Uint8Array(0), '0 bytes are no list'],
    ['cut off in the header', D.slice(0, 18), '18 bytes are no list'],
    ['cut off at the end', D.slice(0, -1), 'claims 127 bytes behind the header and has 126'],
    ['with bytes behind it', Buffer.concat([D, Buffer.alloc(1)]), 'claims 127 bytes behind the header and has 128'],
    ['with another magic', spoilt(0, 0x6d), 'starts with 0x6d'],
    ['with an unknown flag', spoilt(2, 0x04), 'unknown flags 0x4'],
    ['big endian in its flag only', spoilt(2, 0x80), 'claims 9151314442816847872 bytes'],
    ['with a list in it', spoilt(19, 5), "'cmd' is of the unknown type 5"],
    ['with an unknown type', spoilt(19, 99), "'cmd' is of the unknown type 99"],
    ['with a name of no bytes', spoilt(20, 0, 0), 'name of the element at byte 19 has a size of 0'],
    ['with a name far too long', spoilt(20, 0xff, 0xff), 'name of the element at byte 19 has a size of 65535'],
    ['with a NUL in a name', spoilt(38, 0), 'the name of the element at byte 19 ends elsewhere'],
    ['with data beyond the end', spoilt(22, 0xff), 'claims 255 bytes of data'],
    ['with data of 2^64 - 1 bytes', spoilt(22, ...Array(8).fill(0xff)), 'claims 18446744073709551615 bytes of data'],
    ['with an array', spoilt(30, 1), 'an array of 1'],
    ['with a NUL in a string', spoilt(42, 0), "the string 'cmd' does not end where its data ends"],
    ['with a string without NUL', spoilt(52, 0x41), "the string 'cmd' does not end where its data ends"],
    ['with a bool of 2', spoilt(112, 2), "'suspend' is neither true nor false"],
    ['with a descriptor that did not come along', spoilt(138, 1), "'fddir' is descriptor 1 of 1"],
  ])('%s is refused', (_what, message, why) => {
    expect(() => decodeNvlist(message)).toThrow(why);
    expect(() => decodeNvlist(message)).toThrow(FsError);
  });

  it('with a name twice is refused, unless it says that names repeat', () => {
    const element = E.slice(19);
    const twice = Buffer.concat([E, element]);
    twice.writeBigUInt64LE(54n, 11);
    expect(() => decodeNvlist(twice)).toThrow("two elements have the name 'error'");
    twice[2] = 0x02;
    expect(decodeNvlist(twice)).toEqual(new Map([['error', 'x']]));
  });

  it('is either read or refused with a sentence, whatever its bytes are', () => {
    fc.assert(
      fc.property(fc.array(fc.tuple(fc.nat(D.length - 1), fc.nat(255)), { minLength: 1, maxLength: 6 }), (changes) => {
        const message = D.slice();
        for (const [at, byte] of changes) message[at] = byte;
        try {
          decodeNvlist(message);
        } catch (error) {
          expect(error).toBeInstanceOf(FsError);
        }
      }),
    );
  });
});

it('numbers and sizes of a big-endian sender are turned round', () => {
  const message = bytes(`6c 00 80  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 1d
    03 00 02  00 00 00 00 00 00 00 08  00 00 00 00 00 00 00 00  6e 00  00 00 00 00 00 00 01 02`);
  expect(decodeNvlist(message)).toEqual(new Map([['n', 258n]]));
});

it.each([
  ['a name with a NUL', new Map([['a\0', true]])],
  ['a string with a NUL', new Map([['a', 'b\0']])],
  ['a binary without bytes', new Map([['a', new Uint8Array(0)]])],
  ['a name that is too long', new Map([['a'.repeat(2048), true]])],
])('%s is not sent', (_what, list) => {
  expect(() => encodeNvlist(list)).toThrow(FsError);
});
