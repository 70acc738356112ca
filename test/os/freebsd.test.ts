import { constants } from 'node:os';
import { describe, expect, it } from 'vitest';
import {
  deallocate,
  decodeSpaceRange,
  encodeSpaceRange,
  FLOCK_OPERATIONS,
  freebsd,
  LOCK_NB,
} from '../../src/os/freebsd.ts';

describe('struct spacectl_range', () => {
  it('is r_offset and r_len, 64 bits each', () => {
    expect([...encodeSpaceRange(0x1_0000_0002, 0x3000)]).toEqual([
      ...[2, 0, 0, 0, 1, 0, 0, 0], // r_offset
      ...[0, 0x30, 0, 0, 0, 0, 0, 0], // r_len
    ]);
  });

  it('comes back with what is left undone', () => {
    const range = new Uint8Array(16);
    range.set([0, 0x40], 0);
    expect(decodeSpaceRange(range)).toEqual({ position: 0x4000, length: 0 });
  });
});

describe('flock(2)', () => {
  it('never waits: LOCK_SH, LOCK_EX or LOCK_UN with LOCK_NB', () => {
    expect([
      FLOCK_OPERATIONS.shared + LOCK_NB,
      FLOCK_OPERATIONS.exclusive + LOCK_NB,
      FLOCK_OPERATIONS.none + LOCK_NB,
    ]).toEqual([5, 6, 12]);
  });
});

describe('fspacectl(2)', () => {
  /** Gives each of `answers` in turn, having done that many bytes of the range. */
  function kernel(...answers: { result?: number; done: number }[]) {
    const asked: { position: number; length: number }[] = [];
    const call = (range: Uint8Array): number => {
      const { position, length } = decodeSpaceRange(range);
      asked.push({ position, length });
      const { result = 0, done } = answers[asked.length - 1] as { result?: number; done: number };
      range.set(encodeSpaceRange(position + done, length - done));
      return result;
    };
    return { asked, call };
  }

  it('is called again for what it left, also after a signal', () => {
    const { asked, call } = kernel({ done: 30 }, { done: 0, result: -constants.errno.EINTR }, { done: 70 });
    expect(deallocate(call, 1000, 100)).toBe(0);
    expect(asked).toEqual([
      { position: 1000, length: 100 },
      { position: 1030, length: 70 },
      { position: 1030, length: 70 },
    ]);
  });

  it('is not called again when it does nothing, or for an empty range', () => {
    const { asked, call } = kernel({ done: 30 }, { done: 0 });
    expect(deallocate(call, 1000, 100)).toBe(0);
    expect(deallocate(call, 1000, 0)).toBe(0);
    expect(asked).toHaveLength(2);
  });

  it('hands its error on', () => {
    const { call } = kernel({ done: 0, result: -constants.errno.EBADF });
    expect(deallocate(call, 0, 100)).toBe(-constants.errno.EBADF);
  });

  it.skipIf(process.platform === 'freebsd')('is ENOSYS where the C library lacks it, as on FreeBSD 13', () => {
    expect(freebsd.punchHole(0, 0, 1)).toBe(-constants.errno.ENOSYS);
  });
});
