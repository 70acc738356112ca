import { describe, expect, it } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { Polling } from '../../src/fuse/polling.ts';

/** Long enough that a test never sees its end, unless it waits for it. */
const LONG = 10_000_000;

/** A polling thread whose looks are answered by `answers` in turn, then by the last of them. */
function fixture(pollMicroseconds: number, ...answers: readonly (boolean | Error)[]) {
  let looks = 0;
  const polled = new SharedArrayBuffer(4);
  const polling = new Polling({ pollMicroseconds, polled }, () => {
    const answer = answers[Math.min(looks++, answers.length - 1)];
    if (answer instanceof Error) throw answer;
    return answer as boolean;
  });
  /** How often `wait` looked, for each of `times` requests. */
  const waits = (times: number): number[] =>
    Array.from({ length: times }, () => {
      const before = looks;
      polling.wait();
      return looks - before;
    });
  return { polled: new Int32Array(polled), waits };
}

const times = (count: number, value: number): number[] => Array.from({ length: count }, () => value);

describe('waiting for the next request', () => {
  it('looks until one is there', () => {
    expect(fixture(LONG, false, false, false, true).waits(1)).toEqual([4]);
  });

  it('does not look where it was told not to', () => {
    expect(fixture(0, true).waits(3)).toEqual([0, 0, 0]);
  });

  it('takes a run of requests without looking when one was there at once', () => {
    expect(fixture(LONG, true).waits(66)).toEqual([1, ...times(64, 0), 1]);
  });

  it('looks less and less often while nothing comes, and for each request again after a success', () => {
    let comes = false;
    let looks = 0;
    const polling = new Polling({ pollMicroseconds: 1, polled: new SharedArrayBuffer(4) }, () => {
      looks++;
      // The look before polling finds nothing either way.
      return comes && looks > 1;
    });
    const hasLooked = (): boolean => {
      looks = 0;
      polling.wait();
      return looks > 0;
    };
    const looked = Array.from({ length: 257 }, hasLooked).flatMap((did, request) => (did ? [request] : []));
    expect(looked).toEqual([0, 2, 6, 14, 30, 62, 126, 191, 256]);
    comes = true;
    for (let request = 0; request < 64; request++) expect(hasLooked()).toBe(false);
    for (let request = 0; request < 5; request++) expect(hasLooked()).toBe(true);
  });

  it('sleeps at once while another thread polls', () => {
    const { polled, waits } = fixture(LONG, false);
    Atomics.store(polled, 0, 1);
    expect(waits(2)).toEqual([1, 1]);
    expect(Atomics.load(polled, 0)).toBe(1);
  });

  it('lets another thread poll afterwards, whether one came or not', () => {
    for (const answers of [[false, true], [false]]) {
      const { polled, waits } = fixture(100, ...answers);
      waits(1);
      expect(Atomics.load(polled, 0)).toBe(0);
    }
  });

  it('goes on without polling where the system cannot be asked', () => {
    expect(fixture(LONG, new FsError('ENOTSUP', 'koffi did not load')).waits(3)).toEqual([1, 0, 0]);
  });
});
