/**
 * A disk of a running mount: the serving process does the work. Commands go through the disk's `control`
 * (INTERFACE.md, section 3), and the sentence that explains a failure is read through the same descriptor, so it is
 * ours. mkdir and rmdir do the same, but the kernel refuses some of them without asking the server, which leaves an
 * older sentence in `control`.
 */
import { closeSync, openSync, readSync, writeSync } from 'node:fs';
import { open, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { validateNewName } from '../disk/checkpoint-name.ts';
import { type Errno, FsError } from '../errors.ts';
import { showProgress } from './progress.ts';
import { STOP_SIGNALS } from './stop-signals.ts';
import { printable } from './table.ts';
import type { Target } from './target.ts';

/** `directory`: absolute path of the disk's directory. */
export function mountedTarget(directory: string): Target {
  const control = join(directory, 'control');
  const named = (...names: readonly string[]): string => names.map(quoted).join(' ');
  return {
    async takeCheckpoint(name, { withoutMemory = false, external = false } = {}) {
      validateNewName(name);
      const words = external ? 'ext-checkpoint' : 'checkpoint';
      await longCommand(directory, `${words} ${named(name)}${withoutMemory ? ' --no-memory' : ''}`, `keeping ${name}`);
    },
    async deleteCheckpoint(name, { external = false, discard = false } = {}) {
      const words = external ? 'del-ext-checkpoint' : 'del-checkpoint';
      const line = `${words} ${named(name)}${discard ? ' --discard' : ''}`;
      return (await longCommand(directory, line, `${external ? 'merging' : 'deleting'} ${name}`)).trim();
    },
    async renameCheckpoint(oldName, newName) {
      validateNewName(newName);
      command(control, `rename ${named(oldName, newName)}`);
    },
    async rollback(name) {
      await longCommand(directory, `rollback ${named(name)}`, `rolling back to ${name}`);
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
export async function compactMounted(directory: string): Promise<void> {
  await longCommand(directory, 'compact', `compacting ${directory}`);
}

/** As one word of `control`, whatever is in it. */
export const quoted = (name: string): string => `"${name.replaceAll(/["\\]/g, '\\$&')}"`;

/**
 * One command of `control`, its words as they are.
 * @returns its answer
 * @throws FsError with the answer of `control`
 */
export const askDisk = (directory: string, ...words: readonly string[]): string =>
  command(join(directory, 'control'), words.join(' '));

const PROGRESS_MS = 200;

/**
 * One command that may take long. How far it has come is in the disk's info.json: control itself takes no other command
 * meanwhile. Ctrl-C ends this process, which the kernel tells the serving process.
 */
async function longCommand(directory: string, words: string, title: string): Promise<string> {
  const handle = await open(join(directory, 'control'), 'r+');
  const stopShowing = followProgress(directory, title);
  try {
    await handle.write(`${words}\n`);
    return readAnswer(handle.fd);
  } catch (error) {
    throw withAnswer(error, handle.fd);
  } finally {
    stopShowing();
    await handle.close();
  }
}

/** Show the disk's running operation on a terminal. @returns what ends that */
function followProgress(directory: string, title: string): () => void {
  if (!process.stderr.isTTY) return () => {};
  const progress = showProgress(printable(title));
  let over = false;
  const timer = setInterval(async () => {
    const fraction = await progressOf(directory);
    if (fraction !== undefined && !over) progress.update(fraction);
  }, PROGRESS_MS);
  const stop = (): void => {
    over = true;
    clearInterval(timer);
    progress[Symbol.dispose]();
    for (const signal of STOP_SIGNALS) process.off(signal, end);
  };
  // The bar has hidden the cursor: it comes back before the signal does what it always does.
  const end = (signal: NodeJS.Signals): void => {
    stop();
    process.kill(process.pid, signal);
  };
  for (const signal of STOP_SIGNALS) process.on(signal, end);
  return stop;
}

/** Of what runs on the disk, 0 to 1; undefined if nothing does, or that cannot be told. */
async function progressOf(directory: string): Promise<number | undefined> {
  try {
    return JSON.parse(await readFile(join(directory, 'info.json'), 'utf8')).operation?.progress;
  } catch {
    return undefined;
  }
}

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
