/** Long work in steps of some milliseconds, between which the thread serves others. */
import { setImmediate as giveWay } from 'node:timers/promises';

/**
 * Each `next` does one step and tells how far the work has come, from 0 to 1; in the end it returns the result. Whoever
 * stops asking has aborted it: what was done until then stays, and doing it again from the start is right.
 */
export type Steps<T = void> = Generator<number, T>;

export interface StepOptions {
  readonly progress?: (fraction: number) => void;
  readonly signal?: AbortSignal;
}

/** Do all steps, giving way to the event loop between them. @throws the signal's reason once it is aborted */
export async function inSteps<T>(steps: Steps<T>, { progress, signal }: StepOptions = {}): Promise<T> {
  for (;;) {
    signal?.throwIfAborted();
    const step = steps.next();
    if (step.done === true) return step.value;
    progress?.(step.value);
    await giveWay();
  }
}

/** Do all steps at once: for whoever has closed the gate. */
export function atOnce<T>(steps: Steps<T>): T {
  for (;;) {
    const step = steps.next();
    if (step.done === true) return step.value;
  }
}
