import { Presets, SingleBar } from 'cli-progress';

/** How far long work has come. Shown on a terminal only; a pipe or a log gets nothing. */
export interface Progress extends Disposable {
  /** `fraction`: 0 to 1. The first call shows the bar. */
  readonly update: (fraction: number) => void;
}

/** A bar on standard error, taken away again when the work is done. `title`: what is under way. */
export function showProgress(title: string): Progress {
  if (!process.stderr.isTTY) return { update: () => {}, [Symbol.dispose]: () => {} };
  let bar: SingleBar | undefined;
  return {
    update(fraction) {
      if (bar === undefined) {
        bar = new SingleBar(
          { format: `${title} [{bar}] {percentage}%`, stream: process.stderr, clearOnComplete: true, hideCursor: true },
          Presets.legacy,
        );
        bar.start(1, 0);
      }
      bar.update(fraction);
    },
    [Symbol.dispose]() {
      bar?.stop();
    },
  };
}
