/** How a failure looks to the user: one line on standard error, and an exit status. */
import { FsError } from '../errors.ts';
import { fsErrorFrom } from '../os/errno.ts';

/** Exit statuses of every command. `check` has two more meanings, for 2 and 3, in its own file. */
export const exitStatus = { DONE: 0, FAILED: 1, USAGE: 2 } as const;

/** The line for `error`, without the program's name before it. Never more than one line. */
export function sentenceOf(error: unknown): string {
  return plainSentence(error).replaceAll(/\s*[\r\n]+\s*/g, '; ');
}

function plainSentence(error: unknown): string {
  if (error instanceof FsError) return error.message;
  if (!(error instanceof Error)) return String(error);
  const { code, errno, path, syscall } = error as NodeJS.ErrnoException;
  // The host's own failure, with no sentence of ours: at least the call and the file are known.
  if (code !== undefined && errno !== undefined) return fsErrorFrom(error, path ?? syscall ?? 'system call').message;
  return `internal error: ${error.message}; please report it, with what DEBUG=vdskfs:* prints`;
}
