import { closeSync, writeSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { inputWaiter } from '../../src/os/input-waiter.ts';
import { systemCalls } from '../../src/os/system-calls.ts';

describe('the waiter for input', () => {
  it('tells whether read(2) would return at once: with bytes, or at the end', () => {
    const [ours, theirs] = systemCalls().socketPair('stream');
    const isWaiting = inputWaiter(ours);
    try {
      expect(isWaiting()).toBe(false);
      writeSync(theirs, 'x');
      expect(isWaiting()).toBe(true);
    } finally {
      closeSync(theirs);
      expect(isWaiting()).toBe(true);
      closeSync(ours);
    }
  });
});
