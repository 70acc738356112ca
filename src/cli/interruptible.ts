import { FsError } from '../errors.ts';

const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

/**
 * Long work that Ctrl-C may end between any two of its pieces: it gets a function that throws once a signal has come.
 * @param consequence what an interrupted work leaves, for the message: "vm1.raw was not written"
 */
export async function interruptible<T>(consequence: string, work: (check: () => void) => Promise<T>): Promise<T> {
  let caught: NodeJS.Signals | undefined;
  const note = (signal: NodeJS.Signals): void => {
    caught = signal;
  };
  for (const signal of SIGNALS) process.on(signal, note);
  try {
    return await work(() => {
      if (caught !== undefined) throw new FsError('EINTR', `interrupted by ${caught}: ${consequence}`);
    });
  } finally {
    for (const signal of SIGNALS) process.off(signal, note);
  }
}
