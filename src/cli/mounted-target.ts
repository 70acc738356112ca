/**
 * A disk of a running mount. All goes through the mounted file system, so the serving process does the work; the
 * sentence that explains a failure is read from the disk's `control` (INTERFACE.md, section 3).
 */
import { closeSync, mkdirSync, openSync, readFileSync, renameSync, rmdirSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { validateNewName } from '../disk/checkpoint-name.ts';
import { type Errno, FsError } from '../errors.ts';
import type { Target } from './target.ts';

/** `directory`: absolute path of the disk's directory. */
export function mountedTarget(directory: string): Target {
  const control = join(directory, 'control');
  const checkpoint = (name: string): string => {
    validateNewName(name); // `..` or a slash would lead out of snapshots/
    return join(directory, 'snapshots', name);
  };
  return {
    async takeCheckpoint(name) {
      explained(control, () => mkdirSync(checkpoint(name)));
    },
    async deleteCheckpoint(name) {
      explained(control, () => rmdirSync(checkpoint(name)));
    },
    async renameCheckpoint(oldName, newName) {
      explained(control, () => renameSync(checkpoint(oldName), checkpoint(newName)));
    },
    async rollback(name) {
      command(control, `rollback ${quoted(name)}`);
    },
    async resize(bytes, { shrink }) {
      command(control, `resize ${bytes}${shrink ? ' --shrink' : ''}`);
    },
  };
}

/** As one word of `control`, whatever is in it. */
const quoted = (name: string): string => `"${name.replaceAll(/["\\]/g, '\\$&')}"`;

/** Run one system call on the tree; its failure gets the sentence that `control` has for it. */
function explained(control: string, call: () => void): void {
  try {
    call();
  } catch (error) {
    throw withAnswer(error, () => readFileSync(control, 'utf8'));
  }
}

/** Write one command to `control`; the answer is read through the same descriptor, so it is ours and no one else's. */
function command(control: string, words: string): void {
  const fd = openSync(control, 'r+');
  try {
    writeSync(fd, `${words}\n`);
  } catch (error) {
    throw withAnswer(error, () => readFileSync(fd, 'utf8'));
  } finally {
    closeSync(fd);
  }
}

function withAnswer(error: unknown, read: () => string): unknown {
  const code = (error as NodeJS.ErrnoException).code;
  if (error instanceof FsError || code === undefined) return error;
  let answer: string;
  try {
    answer = read().trim();
  } catch {
    return error; // the server is gone: the call's own error says more
  }
  return answer === '' ? error : new FsError(code as Errno, answer, { cause: error });
}
