import { openSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { sentenceOf } from '../../src/cli/failure.ts';
import { FsError } from '../../src/errors.ts';

const thrownBy = (call: () => void): unknown => {
  try {
    call();
  } catch (error) {
    return error;
  }
  throw new Error('nothing was thrown');
};

describe('the line of a failure', () => {
  it("is an expected failure's own sentence", () => {
    expect(sentenceOf(new FsError('EBUSY', 'vm1.qcow2: in use'))).toBe('vm1.qcow2: in use');
  });

  it("names the file of the host's failures", () => {
    expect(sentenceOf(thrownBy(() => openSync('/no/such/file', 'r')))).toBe(
      '/no/such/file: no such file or directory (ENOENT)',
    );
  });

  it('is one line, whatever is in it', () => {
    expect(sentenceOf(new FsError('EIO', 'first\n  second\r\nthird'))).toBe('first; second; third');
  });

  it('calls our own bugs by that name', () => {
    expect(sentenceOf(new TypeError('x is not a function'))).toMatch(/^internal error: x is not a function; /);
  });

  it('says what was thrown when it was no error', () => {
    expect(sentenceOf('nonsense')).toBe('nonsense');
  });
});
