/**
 * A disk of a running mount: the serving process does the work. Commands go through the disk's `control`
 * (INTERFACE.md, section 3), and the sentence that explains a failure is read through the same descriptor, so it is
 * ours. mkdir and rmdir do the same, but the kernel refuses some of them without asking the server, which leaves an
 * older sentence in `control`.
 */
import { closeSync, openSync, readSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { validateNewName } from '../disk/checkpoint-name.ts';
import { type Errno, FsError } from '../errors.ts';
import type { Target } from './target.ts';

/** `directory`: absolute path of the disk's directory. */
export function mountedTarget(directory: string): Target {
  const control = join(directory, 'control');
  const named = (...names: readonly string[]): string => names.map(quoted).join(' ');
  return {
    async takeCheckpoint(name, { withoutMemory = false, external = false } = {}) {
      validateNewName(name);
      command(
        control,
        `${external ? 'ext-checkpoint' : 'checkpoint'} ${named(name)}${withoutMemory ? ' --no-memory' : ''}`,
      );
    },
    async deleteCheckpoint(name, { external = false, discard = false } = {}) {
      const words = external ? 'del-ext-checkpoint' : 'del-checkpoint';
      return command(control, `${words} ${named(name)}${discard ? ' --discard' : ''}`).trim();
    },
    async renameCheckpoint(oldName, newName) {
      validateNewName(newName);
      command(control, `rename ${named(oldName, newName)}`);
    },
    async rollback(name) {
      command(control, `rollback ${named(name)}`);
    },
    async resize(bytes, { shrink }) {
      command(control, `resize ${bytes}${shrink ? ' --shrink' : ''}`);
    },
  };
}

/**
 * Roll all disks of the guest back to a checkpoint with memory.
 * @returns the path of its memory, for the guest to start from
 */
export const rollBackToRestore = (directory: string, name: string): string =>
  command(join(directory, 'control'), `restore ${quoted(name)}`).replace(/\n$/, '');

/**
 * The kernel passes Ctrl-C on to the serving process, which ends the work between two steps.
 * @throws FsError
 */
export const compactMounted = (directory: string): void => {
  command(join(directory, 'control'), 'compact');
};

/** As one word of `control`, whatever is in it. */
export const quoted = (name: string): string => `"${name.replaceAll(/["\\]/g, '\\$&')}"`;

/**
 * One command of `control`, its words as they are.
 * @returns its answer
 * @throws FsError with the answer of `control`
 */
export const askDisk = (directory: string, ...words: readonly string[]): string =>
  command(join(directory, 'control'), words.join(' '));

/** Write one command. @returns its answer @throws FsError with the answer of `control` */
function command(control: string, words: string): string {
  const fd = openSync(control, 'r+');
  try {
    writeSync(fd, `${words}\n`);
    return readAnswer(fd);
  } catch (error) {
    throw withAnswer(error, fd);
  } finally {
    closeSync(fd);
  }
}

/** From where the file stands to its end, whatever its attributes say: they are of another answer. */
function readAnswer(fd: number): string {
  const chunks: Buffer[] = [];
  for (;;) {
    const chunk = Buffer.alloc(ANSWER_CHUNK_BYTES);
    const got = readSync(fd, chunk, 0, chunk.length, null);
    if (got === 0) return Buffer.concat(chunks).toString();
    chunks.push(chunk.subarray(0, got));
  }
}

const ANSWER_CHUNK_BYTES = 128 * 1024;

function withAnswer(error: unknown, fd: number): unknown {
  const code = (error as NodeJS.ErrnoException).code;
  if (code === undefined) return error;
  let answer: string;
  try {
    answer = readAnswer(fd).trim();
  } catch {
    return error; // the server is gone: the call's own error says more
  }
  return answer === '' ? error : new FsError(code as Errno, answer, { cause: error });
}
