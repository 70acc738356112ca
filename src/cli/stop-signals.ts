/** Signals that ask a process to end. */
export const STOP_SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;
/** Under npm a Ctrl-C arrives twice, from the terminal and from npm: what follows within a moment is the same wish. */
const SAME_WISH_MS = 1000;

export interface StopSignals {
  /** How often the end has been asked for. */
  readonly count: number;
  /** Called at each wish from now on, and now for those that came before. */
  listen(onWish: (count: number) => void): void;
}

/** From now on these signals do not end the process by themselves. */
export function watchStopSignals(now: () => number = Date.now): StopSignals {
  let count = 0;
  let last = Number.NEGATIVE_INFINITY;
  let listener: ((count: number) => void) | undefined;
  const onSignal = (): void => {
    const at = now();
    const same = at - last < SAME_WISH_MS;
    last = at;
    if (same) return;
    count++;
    listener?.(count);
  };
  for (const signal of STOP_SIGNALS) process.on(signal, onSignal);
  return {
    get count() {
      return count;
    },
    listen(onWish) {
      listener = onWish;
      if (count > 0) onWish(count);
    },
  };
}
