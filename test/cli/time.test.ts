import { describe, expect, it } from 'vitest';
import { formatClock, formatMoment } from '../../src/cli/time.ts';

describe("a guest's clock", () => {
  it.each([
    ['counts from zero', 0, '00:00:00.000'],
    ['is cut, not rounded, to milliseconds', 1_999_999, '00:00:00.001'],
    ['has minutes and hours', 3_723_004_000_000, '01:02:03.004'],
    ['has as many hours as there are', 360_000_000_000_000, '100:00:00.000'],
  ])('%s', (_rule, nanoseconds, text) => {
    expect(formatClock(nanoseconds)).toBe(text);
  });
});

describe('a moment', () => {
  it('is shown in local time', () => {
    expect(formatMoment(new Date(2026, 2, 1, 14, 5, 9).getTime())).toBe('2026-03-01 14:05:09');
  });

  it('that no calendar has is shown as a dash', () => {
    expect(formatMoment(Number.NaN)).toBe('-');
  });
});
