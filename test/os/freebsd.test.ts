import { describe, expect, it } from 'vitest';
import { decodeSpaceRange, encodeSpaceRange, FLOCK_OPERATIONS, LOCK_NB } from '../../src/os/freebsd.ts';

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
