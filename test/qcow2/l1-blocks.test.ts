import { describe, expect, it } from 'vitest';
import { number } from '../../src/qcow2/image.ts';
import { makeRoomForL1Entry, writeL1Entries } from '../../src/qcow2/l1-blocks.ts';
import { Recorder } from '../storage/recorder.ts';
import { formatted, openSession } from './model.ts';

/** 8 TiB: 16,384 L1 entries, 32 blocks of 4 KiB. */
const BYTES = 2 ** 43;

function recorded() {
  const recorder = new Recorder(formatted({ size: BYTES }));
  const session = openSession(recorder);
  const writes = () =>
    recorder.operations.flatMap((one) =>
      one.kind === 'write' ? [{ position: one.position - table, bytes: one.bytes.length }] : [],
    );
  const table = session.image.numbers[number.L1_OFFSET] as number;
  return { ...session, table, writes };
}

describe('the room for an L1 entry', () => {
  it('is the block that it lies in, written as zeros', () => {
    const { image, writes } = recorded();
    makeRoomForL1Entry(image, 513);
    expect(writes()).toEqual([{ position: 4096, bytes: 4096 }]);
  });
});

describe('writing L1 entries', () => {
  it.each([
    ['blocks of zeros are left out', 0, [600], [[4096, 4096]]],
    ['of the first block only what is given', 100, [100, 511], [[800, 3296]]],
    [
      'adjacent blocks go at once',
      0,
      [0, 512, 1600],
      [
        [0, 8192],
        [12_288, 4096],
      ],
    ],
    ['nothing at all', 0, [], []],
  ])('%s', (_what, first, set, expected) => {
    const { image, table, writes } = recorded();
    const entries = new Uint8Array((2048 - first) * 8);
    for (const index of set) entries[(index - first) * 8 + 7] = 1;
    writeL1Entries(image, entries, table + first * 8);
    expect(writes()).toEqual(expected.map(([position, bytes]) => ({ position, bytes })));
  });
});
