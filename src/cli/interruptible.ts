import { FsError } from '../errors.ts';
import { STOP_SIGNALS } from './stop-signals.ts';

/**
 * Long work that Ctrl-C may break off between any two of its steps: its signal is aborted then, with the error to throw.
 * @param consequence what broken-off work leaves, for the message: "vm1.raw was not written"
 */
export async function interruptible<T>(consequence: string, work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController();
  const abort = (signal: NodeJS.Signals): void => {
    controller.abort(new FsError('EINTR', `interrupted by ${signal}: ${consequence}`));
  };
  for (const signal of STOP_SIGNALS) process.on(signal, abort);
  try {
    return await work(controller.signal);
  } finally {
    for (const signal of STOP_SIGNALS) process.off(signal, abort);
  }
}
