import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { formatSize, parseSize } from '../../src/cli/size.ts';

describe('a size given by the user', () => {
  it.each([
    ['plain bytes', '512', 512],
    ['zero', '0', 0],
    ['bytes by name', '512B', 512],
    ['kibibytes', '64K', 65536],
    ['small letters', '64k', 65536],
    ['mebibytes', '512M', 536_870_912],
    ['gibibytes, written out', '10GiB', 10_737_418_240],
    ['a fraction that is whole in bytes', '1.5T', 1_649_267_441_664],
    ['a fraction with trailing zeros', '1.50K', 1536],
    ['spaces around it', ' 1G ', 1_073_741_824],
    ['the largest', '9007199254740991', 2 ** 53 - 1],
  ])('%s', (_rule, text, bytes) => {
    expect(parseSize(text)).toBe(bytes);
  });

  it.each([
    ['empty', ''],
    ['a unit alone', 'G'],
    ['negative', '-1'],
    ['a sign', '+1G'],
    ['hexadecimal', '0x10'],
    ['an exponent', '1e9'],
    ['a unit of powers of ten, which would be misread', '10GB'],
    ['an unknown unit', '10X'],
    ['no digit before the point', '.5G'],
    ['no digit behind the point', '1.G'],
    ['not whole in bytes', '1.1K'],
    ['a fraction of a byte', '0.5'],
    ['2^53', '9007199254740992'],
    ['far above 2^53', '99999999999999999999E'],
    ['a fraction without end', `0.${'0'.repeat(400)}1G`],
    ['two numbers', '1G 2G'],
  ])('is refused when it is %s', (_rule, text) => {
    expect(parseSize(text)).toBeUndefined();
  });

  it('is any whole number of any unit below 2^53', () => {
    const units = fc.constantFrom(...(['', 'K', 'M', 'G', 'T', 'P'] as const).map((name, power) => ({ name, power })));
    fc.assert(
      fc.property(fc.nat({ max: 7 }), units, (count, { name, power }) => {
        expect(parseSize(`${count}${name}`)).toBe(count * 1024 ** power);
      }),
    );
  });
});

describe('a size shown to the user', () => {
  it.each([
    [0, '0 B'],
    [512, '512 B'],
    [1023, '1023 B'],
    [1024, '1 KiB'],
    [1536, '1.5 KiB'],
    [65536, '64 KiB'],
    [1_234_567, '1.18 MiB'],
    [10_737_418_240, '10 GiB'],
    [1_649_267_441_664, '1.5 TiB'],
    [1024 * 1024 - 1, '1 MiB'],
  ])('%d is %s', (bytes, text) => {
    expect(formatSize(bytes)).toBe(text);
  });

  it('is never longer than eight characters, and never 1024 of a unit', () => {
    fc.assert(
      fc.property(fc.maxSafeNat(), (bytes) => {
        const text = formatSize(bytes);
        expect(text).toMatch(/^\d{1,4}(\.\d{1,2})? [KMGTPE]?i?B$/);
        expect(text.length).toBeLessThanOrEqual(8);
        expect(text.startsWith('1024')).toBe(false);
      }),
    );
  });
});
