/**
 * Errno names, their numbers on this host, and the way from a failed system call to an `FsError`.
 * The only place where errno numbers are met.
 */
import { constants } from 'node:os';
import { getSystemErrorMap } from 'node:util';
import { type Errno, FsError } from '../errors.ts';

/** FreeBSD and macOS: "attribute not found", which takes the place of ENODATA there (errno.h, 87 and 93). */
const ENOATTR: Partial<Record<NodeJS.Platform, number>> = { freebsd: 87, darwin: 93 };

/** Linux's numbers (asm-generic/errno.h) of what a host's own table may lack. */
const FALLBACK: Partial<Record<Errno, number>> = { ENODATA: 61, ENOTSUP: 95, ESTALE: 116 };

/** Names that say the same as one of ours. All others become EIO, with the original name kept in the sentence. */
const SYNONYMS: Readonly<Record<string, Errno>> = {
  ECONNREFUSED: 'ENOTCONN',
  EDQUOT: 'ENOSPC',
  EFTYPE: 'EINVAL',
  ELOOP: 'EINVAL',
  ENOATTR: 'ENODATA',
  ENOLCK: 'ENOTSUP',
  ENODEV: 'ENXIO',
  EOPNOTSUPP: 'ENOTSUP',
  ETXTBSY: 'EBUSY',
  EWOULDBLOCK: 'EAGAIN',
};

/** Every `Errno`, in the order in which a number shared by two names is resolved. */
const NAMES = [
  'EACCES',
  'EAGAIN',
  'EBADF',
  'EBUSY',
  'EEXIST',
  'EFBIG',
  'EINTR',
  'EINVAL',
  'EIO',
  'EISDIR',
  'ENAMETOOLONG',
  'ENODATA',
  'ENOENT',
  'ENOSPC',
  'ENOSYS',
  'ENOTCONN',
  'ENOTDIR',
  'ENOTEMPTY',
  'ENOTSUP',
  'ENXIO',
  'EOVERFLOW',
  'EPERM',
  'ERANGE',
  'EROFS',
  'ESTALE',
  'ETIMEDOUT',
  'EXDEV',
] as const satisfies readonly Errno[];

/** Numbers of all `Errno` names, given the errno table that Node has for the platform. */
export function errnoTable(
  known: Readonly<Record<string, number | undefined>>,
  platform: NodeJS.Platform,
): Readonly<Record<Errno, number>> {
  const numberOf = (name: Errno): number => {
    const number =
      known[name] ??
      (name === 'ENODATA' ? ENOATTR[platform] : undefined) ??
      (name === 'ENOTSUP' ? known.EOPNOTSUPP : undefined) ??
      FALLBACK[name];
    if (number === undefined) throw new Error(`this host has no number for ${name}`);
    return number;
  };
  return Object.fromEntries(NAMES.map((name) => [name, numberOf(name)])) as Record<Errno, number>;
}

const numbers = errnoTable(constants.errno, process.platform);
const names = new Map<number, string>(
  [...Object.entries(constants.errno), ...NAMES.map((name) => [name, numbers[name]] as const)].map(([name, number]) => [
    number,
    name,
  ]),
);

/** The errno's number on this host, positive. */
export const errnoNumber = (name: Errno): number => numbers[name];

const isErrno = (name: string): name is Errno => name in numbers;
const fold = (name: string): Errno => (isErrno(name) ? name : (SYNONYMS[name] ?? 'EIO'));

/** The `Errno` for a positive errno number of this host; EIO for one that vdskfs never answers with. */
export const errnoName = (number: number): Errno => fold(names.get(number) ?? 'EIO');

/** In words, where the system's own words say too little. */
const REASONS: Readonly<Record<string, string>> = {
  ENOSPC: 'the host disk is full',
  EDQUOT: 'the quota on the host disk is used up',
  EISDIR: 'it is a directory',
  EROFS: 'the host file system is mounted read-only',
  EIO: 'the host disk reported an I/O error',
};

const described: ReadonlyMap<number, readonly [string, string]> = getSystemErrorMap();

/** "no such file or directory (ENOENT)". `name` is the system's name, also one that `Errno` lacks. */
function reasonFor(name: string, number: number | undefined): string {
  const words = REASONS[name] ?? (number === undefined ? undefined : described.get(-Math.abs(number))?.[1]);
  return words === undefined ? name : `${words} (${name})`;
}

/**
 * The failure of a host operation as an `FsError`: `what`, a colon and the reason in words. An `FsError` passes
 * through unchanged; what is no system error at all (our own bug) is thrown on as it is.
 * @param failure what a call of `node:fs` threw, or a positive errno number
 * @param what the operation and the file: "cannot write 4096 bytes at 0x10000 of 'a.qcow2'"
 */
export function fsErrorFrom(failure: unknown, what: string): FsError {
  if (typeof failure === 'number') {
    const name = names.get(failure) ?? `errno ${failure}`;
    return new FsError(fold(name), `${what}: ${reasonFor(name, failure)}`);
  }
  if (failure instanceof FsError) return failure;
  const { code, errno } = failure as NodeJS.ErrnoException;
  // Node's own argument checks have a code (ERR_…) but no errno: those are bugs, not failures of the host.
  if (typeof code !== 'string' || typeof errno !== 'number') throw failure;
  return new FsError(fold(code), `${what}: ${reasonFor(code, errno)}`, { cause: failure });
}

/** The system's error code ("EINTR") if `failure` is a failed system call of Node's. */
export const codeOf = (failure: unknown): string | undefined => (failure as NodeJS.ErrnoException | null)?.code;
