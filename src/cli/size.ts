/** Sizes as users type and read them. Powers of 1024 throughout, as in qemu-img. */

const UNITS = ['', 'K', 'M', 'G', 'T', 'P', 'E'] as const;
const FORM = /^(\d+)(?:\.(\d+))?(?:([KMGTPE])(?:iB)?|B)?$/i;
/** Longer fractions say nothing: 2^-60 has 18 decimals before its first digit that counts. */
const FRACTION_DIGITS = 18;

/**
 * `10G`, `512M`, `1.5T`, `64KiB` or plain bytes, in bytes.
 * @returns undefined if it is no size, not a whole number of bytes, or 2^53 and more
 */
export function parseSize(text: string): number | undefined {
  const match = FORM.exec(text.trim());
  if (match === null) return undefined;
  const [, whole = '', fraction = '', letter = ''] = match;
  if (fraction.length > FRACTION_DIGITS) return undefined;
  // As an integer over a power of ten: 1.1G must not become whole by rounding.
  const scale = 10n ** BigInt(fraction.length);
  const scaled =
    BigInt(whole + fraction) * 1024n ** BigInt(UNITS.indexOf(letter.toUpperCase() as (typeof UNITS)[number]));
  if (scaled % scale !== 0n) return undefined;
  const bytes = scaled / scale;
  return bytes <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(bytes) : undefined;
}

/** For people: `1.5 GiB`, `64 KiB`, `512 B`; three digits that count. */
export function formatSize(bytes: number): string {
  let value = bytes;
  let unit = 0;
  // 1023.5 would be shown as 1024.
  while (value >= 1023.5 && unit < UNITS.length - 1) {
    value /= 1024;
    unit++;
  }
  if (unit === 0) return `${bytes} B`;
  const decimals = value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
  return `${Number(value.toFixed(decimals))} ${UNITS[unit]}iB`;
}
