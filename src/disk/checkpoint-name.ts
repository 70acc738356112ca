/** The names of checkpoints: which ones users may give, and what those made elsewhere are shown as. Pure. */
import { Buffer } from 'node:buffer';
import { FsError } from '../errors.ts';

/** Longest file name in bytes: NAME_MAX of Linux and FreeBSD, and what QEMU keeps of a snapshot's name. */
export const NAME_BYTES = 255;

/** Beyond this the ID itself is cut: the name before it must stay readable. */
const ID_BYTES = 64;

/** Room for the `~N` that keeps two names apart; the format holds at most 65,536 snapshots. */
const SUFFIX_BYTES = 6;

const LONE_SURROGATE = /\p{Surrogate}/u;

/** A checkpoint as the image has it. */
export interface RawName {
  readonly id: string;
  /** `nameBytes` as text; bytes that are no UTF-8 have become U+FFFD. */
  readonly name: string;
  readonly nameBytes: Uint8Array;
}

/** Why `name` cannot be a file name, in words that follow "its name"; undefined if it can. */
function fault(name: string): { errno: 'EINVAL' | 'ENAMETOOLONG'; why: string } | undefined {
  if (name === '') return { errno: 'EINVAL', why: 'is empty' };
  if (name === '.' || name === '..') return { errno: 'EINVAL', why: 'means a directory of the tree' };
  if (name.includes('/')) return { errno: 'EINVAL', why: 'contains a slash' };
  if (name.includes('\0')) return { errno: 'EINVAL', why: 'contains a NUL' };
  if (LONE_SURROGATE.test(name)) return { errno: 'EINVAL', why: 'is not valid UTF-8' };
  const bytes = Buffer.byteLength(name);
  if (bytes > NAME_BYTES) return { errno: 'ENAMETOOLONG', why: `has ${bytes} bytes` };
  return undefined;
}

/**
 * Check a name for a new checkpoint, or a checkpoint's new name. Whether it is taken already is not asked here.
 * @throws FsError EINVAL, ENAMETOOLONG
 */
export function validateNewName(name: string): void {
  const found = fault(name);
  if (found === undefined) return;
  const shown = Buffer.byteLength(name) > NAME_BYTES ? `${cut(name, 40)}…` : name;
  throw new FsError(
    found.errno,
    `A checkpoint cannot be named ${JSON.stringify(shown)}: that name ${found.why}; give 1 to ${NAME_BYTES} bytes of UTF-8 without slash and NUL, other than . and ..`,
  );
}

/**
 * The file name each checkpoint is shown under, in the order given; all are valid and no two are alike.
 * A name that is valid and used once is shown as it is, also when it looks like another's ID or like `name~ID`;
 * all others become `name~ID`, with `/` as `∕` and NUL as `␀`, the name cut to fit, and `~2`, `~3` … behind it
 * should even that be taken.
 */
export function shownNames(entries: readonly RawName[]): string[] {
  const uses = new Map<string, number>();
  for (const entry of entries) uses.set(entry.name, (uses.get(entry.name) ?? 0) + 1);
  const plain = (entry: RawName): boolean =>
    uses.get(entry.name) === 1 && fault(entry.name) === undefined && Buffer.from(entry.name).equals(entry.nameBytes);

  const taken = new Set(entries.filter(plain).map((entry) => entry.name));
  // Where the search for a free suffix goes on: thousands of snapshots with one name and one ID stay cheap.
  const lastSuffix = new Map<string, number>();
  return entries.map((entry) => {
    if (plain(entry)) return entry.name;
    const tail = `~${cut(printable(entry.id), ID_BYTES)}`;
    const stem = cut(printable(entry.name), NAME_BYTES - Buffer.byteLength(tail) - SUFFIX_BYTES) + tail;
    let suffix = lastSuffix.get(stem) ?? 0;
    let shown: string;
    do {
      suffix++;
      shown = suffix === 1 ? stem : `${stem}~${suffix}`;
    } while (taken.has(shown));
    lastSuffix.set(stem, suffix);
    taken.add(shown);
    return shown;
  });
}

/** Without what no file name can hold; lone surrogates become U+FFFD. */
const printable = (text: string): string => Buffer.from(text.replaceAll('/', '∕').replaceAll('\0', '␀')).toString();

/** The longest start of `text` that has at most `bytes` bytes in UTF-8, whole characters only. */
function cut(text: string, bytes: number): string {
  const encoded = Buffer.from(text);
  if (encoded.length <= bytes) return text;
  let end = bytes;
  while (((encoded[end] as number) & 0xc0) === 0x80) end--;
  return encoded.toString('utf8', 0, end);
}
