import { STOP_SIGNALS } from './stop-signals.ts';

/**
 * Ctrl-C must not leave a change half done: while one runs, signals are noted and it goes on to its end, which is near.
 * A kill that cannot be held back leaves what a power failure would: nothing that the next open cannot mend.
 */
export async function uninterrupted<T>(change: () => Promise<T>): Promise<T> {
  const hold = (): void => {
    if (process.stderr.isTTY) process.stderr.write('vdskfs: finishing the change first\n');
  };
  for (const signal of STOP_SIGNALS) process.on(signal, hold);
  try {
    return await change();
  } finally {
    for (const signal of STOP_SIGNALS) process.off(signal, hold);
  }
}
