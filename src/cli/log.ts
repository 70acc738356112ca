/** What a serving process says while it runs: to the terminal in the foreground, to its log file when detached. */
import createDebug from 'debug';

/** Levels of --log-level and the names of the debug package that each of them shows. */
export const logLevels = {
  error: 'vdskfs:error',
  info: 'vdskfs:*,-vdskfs:*:*',
  debug: 'vdskfs:*',
} as const;
export type LogLevel = keyof typeof logLevels;

/** DEBUG in the environment has the last word. Before any thread starts: each takes over what is set then. */
export function setLogLevel(level: LogLevel): void {
  if (!process.env.DEBUG) createDebug.enable(logLevels[level]);
}

/** One line that is printed at every level, such as why an unmount was refused. */
export function say(sentence: string): void {
  process.stderr.write(`vdskfs: ${sentence}\n`);
}
