import { openSync } from 'node:fs';
import { constants } from 'node:os';
import { describe, expect, it } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { codeOf, errnoName, errnoNumber, errnoTable, fsErrorFrom } from '../../src/os/errno.ts';

/** What Node's table has on FreeBSD (sys/errno.h): no ENODATA, and ENOTSUP under its other name at least. */
const FREEBSD = {
  ...{ EPERM: 1, ENOENT: 2, EINTR: 4, EIO: 5, ENXIO: 6, EBADF: 9, EACCES: 13, EBUSY: 16, EEXIST: 17, EXDEV: 18 },
  ...{ ENOTDIR: 20, EISDIR: 21, EINVAL: 22, EFBIG: 27, ENOSPC: 28, EROFS: 30, ERANGE: 34, EAGAIN: 35 },
  ...{
    EOPNOTSUPP: 45,
    ENOTCONN: 57,
    ETIMEDOUT: 60,
    ENAMETOOLONG: 63,
    ENOTEMPTY: 66,
    ESTALE: 70,
    ENOSYS: 78,
    EOVERFLOW: 84,
  },
};

describe('the table of numbers', () => {
  it("FreeBSD: ENOATTR for ENODATA, EOPNOTSUPP for ENOTSUP, and the system's own for the rest", () => {
    expect(errnoTable(FREEBSD, 'freebsd')).toMatchObject({ ENODATA: 87, ENOTSUP: 45, EAGAIN: 35, ENOSYS: 78 });
  });

  it('Linux: its own numbers', () => {
    expect(errnoTable({ ...FREEBSD, ENODATA: 61, ENOTSUP: 95, EOPNOTSUPP: 95 }, 'linux')).toMatchObject({
      ENODATA: 61,
      ENOTSUP: 95,
    });
  });

  it('a name that a host does not have is our bug, found when the program starts', () => {
    expect(() => errnoTable({}, 'linux')).toThrow('no number for EACCES');
  });
});

describe('errno numbers of this host', () => {
  it('lead from the name to the number and back', () => {
    expect(errnoNumber('ENOENT')).toBe(constants.errno.ENOENT);
    for (const name of ['ENOENT', 'EAGAIN', 'ENOTSUP', 'ENODATA', 'ENOSPC', 'EIO', 'ENOSYS'] as const) {
      expect(errnoName(errnoNumber(name))).toBe(name);
    }
  });

  it.each([
    ['ECONNREFUSED', 'ENOTCONN'],
    ['EDQUOT', 'ENOSPC'],
    ['ELOOP', 'EINVAL'],
    ['EOPNOTSUPP', 'ENOTSUP'],
    ['ENOLCK', 'ENOTSUP'],
    ['ETXTBSY', 'EBUSY'],
    ['EMFILE', 'EIO'],
    ['ECONNABORTED', 'EIO'],
  ] as const)('%s becomes %s', (name, expected) => {
    expect(errnoName(constants.errno[name])).toBe(expected);
  });

  it('an unknown number becomes EIO', () => {
    expect(errnoName(4000)).toBe('EIO');
  });
});

describe('fsErrorFrom', () => {
  const failureOf = (action: () => unknown): unknown => {
    try {
      action();
    } catch (error) {
      return error;
    }
    throw new Error('nothing was thrown');
  };

  it("takes a failure of Node's file calls, with its words and the cause", () => {
    const cause = failureOf(() => openSync('/nowhere/at/all', 'r'));
    const error = fsErrorFrom(cause, "cannot open 'a'");
    expect(error).toBeInstanceOf(FsError);
    expect([error.errno, error.message]).toEqual(['ENOENT', "cannot open 'a': no such file or directory (ENOENT)"]);
    expect(error.cause).toBe(cause);
    expect(codeOf(cause)).toBe('ENOENT');
  });

  it('takes a number', () => {
    const full = fsErrorFrom(constants.errno.ENOSPC, 'cannot write');
    expect([full.errno, full.message]).toEqual(['ENOSPC', 'cannot write: the host disk is full (ENOSPC)']);
  });

  it('keeps in the sentence the name of what it folds', () => {
    const error = fsErrorFrom(constants.errno.EMFILE, "cannot open 'a'");
    expect([error.errno, error.message]).toEqual(['EIO', "cannot open 'a': too many open files (EMFILE)"]);
    expect(fsErrorFrom(4000, 'x').message).toBe('x: errno 4000');
  });

  it('leaves an FsError as it is', () => {
    const error = new FsError('EBUSY', 'busy');
    expect(fsErrorFrom(error, 'x')).toBe(error);
  });

  it.each([
    ['an error of ours', new Error('assertion')],
    ['an argument that Node refuses', failureOf(() => openSync(7 as unknown as string, 'r'))],
  ])('throws on what is no system error: %s', (_what, bug) => {
    expect(failureOf(() => fsErrorFrom(bug, 'x'))).toBe(bug);
  });
});
