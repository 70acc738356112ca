/** Processes of this host and the arguments they show: from /proc on Linux, by ps(1) on FreeBSD and macOS. */
import { readdir, readFile } from 'node:fs/promises';
import { runCommand } from './run-command.ts';

export interface Process {
  readonly pid: number;
  /** As the process shows them, never empty: a process may have put a title in their place. */
  readonly argv: readonly string[];
}

/** Processes that others may not see, and those that are on their way out, are left out. */
export const processes = (): Promise<Process[]> => (process.platform === 'linux' ? fromProc() : fromPs(['-ax']));

/** The process `pid`, if it is there and not on its way out. */
export async function processOf(pid: number): Promise<Process | undefined> {
  return process.platform === 'linux' ? oneOfProc(pid) : (await fromPs(['-p', String(pid)]))[0];
}

async function fromProc(): Promise<Process[]> {
  const pids = (await readdir('/proc').catch(() => [])).map(Number).filter(Number.isInteger);
  const found = await Promise.all(pids.map(oneOfProc));
  return found.filter((one) => one !== undefined);
}

async function oneOfProc(pid: number): Promise<Process | undefined> {
  // Empty for kernel threads, and for a process that has given up its memory: one that has ended or is ending.
  const argv = parseCommandLine(await readFile(`/proc/${pid}/cmdline`).catch(() => Buffer.alloc(0)));
  return argv.length === 0 ? undefined : { pid, argv };
}

/** Text of /proc/PID/cmdline: NUL behind each argument. A shorter title over the arguments leaves NULs at the end. */
export function parseCommandLine(text: Buffer): string[] {
  const argv = text.toString().split('\0');
  while (argv.length > 0 && argv.at(-1) === '') argv.pop();
  return argv;
}

async function fromPs(which: readonly string[]): Promise<Process[]> {
  const { stdout } = await runCommand({
    program: 'ps',
    args: [...which, '-ww', '-o', 'pid=', '-o', 'state=', '-o', 'args='],
  });
  return parsePs(stdout);
}

/**
 * Lines of `ps -o pid= -o state= -o args=`. ps sets no quotes, so arguments with blanks in them come apart; a title of
 * the form "program: what it does" stays in one piece, without the name in parentheses that ps puts behind some.
 */
export function parsePs(text: string): Process[] {
  const found: Process[] = [];
  for (const line of text.split('\n')) {
    const [, pid, state, args] = /^\s*(\d+)\s+(\S+)\s+(.*\S)\s*$/.exec(line) ?? [];
    // Z: a zombie; E: trying to exit. The letter of the run state comes first, flags follow it.
    if (pid === undefined || state === undefined || args === undefined || /^Z|E/.test(state)) continue;
    const title = args.replace(/ \(\S+\)$/, '');
    found.push({ pid: Number(pid), argv: /^[^\s/]+: /.test(title) ? [title] : args.split(/\s+/) });
  }
  return found;
}
