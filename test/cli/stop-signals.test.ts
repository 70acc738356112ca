import { afterEach, describe, expect, it } from 'vitest';
import { watchStopSignals } from '../../src/cli/stop-signals.ts';

const names = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;
const before = new Map(names.map((name) => [name, process.listeners(name)]));
afterEach(() => {
  for (const name of names) {
    for (const listener of process.listeners(name)) {
      if (!before.get(name)?.includes(listener)) process.off(name, listener);
    }
  }
});

/** Signals at a time of our choosing, delivered as the process would. */
const watched = () => {
  let nowMs = 0;
  const signals = watchStopSignals(() => nowMs);
  const wishes: number[] = [];
  return {
    signals,
    wishes,
    listen: () => signals.listen((count) => wishes.push(count)),
    send: (name: (typeof names)[number], atMs: number) => {
      nowMs = atMs;
      process.emit(name, name);
    },
  };
};

describe('signals to stop', () => {
  it.each(names)('%s is a wish', (name) => {
    const { listen, send, wishes } = watched();
    listen();
    send(name, 0);
    expect(wishes).toEqual([1]);
  });

  it('that follow within a second are the same wish: npm passes on what the terminal has sent already', () => {
    const { listen, send, wishes } = watched();
    listen();
    send('SIGINT', 0);
    send('SIGINT', 3);
    send('SIGTERM', 900);
    send('SIGINT', 1950);
    expect(wishes).toEqual([1, 2]);
  });

  it('that came before anyone listened are not lost', () => {
    const { signals, listen, send, wishes } = watched();
    send('SIGTERM', 0);
    expect(signals.count).toBe(1);
    listen();
    expect(wishes).toEqual([1]);
  });
});
