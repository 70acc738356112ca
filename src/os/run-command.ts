import { spawn } from 'node:child_process';

export interface Command {
  readonly program: string;
  readonly args: readonly string[];
  /** Added to this process's environment. */
  readonly env?: Readonly<Record<string, string>>;
  /** Descriptor of this process that the program finds as its descriptor 3. */
  readonly inherited?: number;
}

export interface CommandResult {
  /** Exit status; -1 if a signal ended it. */
  readonly status: number;
  readonly stdout: string;
  /** What it said on standard error, in one line. */
  readonly complaint: string;
}

/**
 * Run a program to its end without blocking this thread: the program may well wait for an answer of ours.
 * @throws the system error of starting it, such as ENOENT
 */
export function runCommand({ program, args, env, inherited }: Command): Promise<CommandResult> {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, {
      env: { ...process.env, LC_ALL: 'C', ...env },
      stdio: ['ignore', 'pipe', 'pipe', ...(inherited === undefined ? [] : [inherited])],
    });
    let stdout = '';
    let stderr = '';
    child.stdout?.setEncoding('utf8').on('data', (text: string) => (stdout += text));
    child.stderr?.setEncoding('utf8').on('data', (text: string) => (stderr += text));
    child.on('error', reject);
    child.on('close', (status) => {
      resolve({ status: status ?? -1, stdout, complaint: stderr.trim().replace(/\s*\n\s*/g, '; ') });
    });
  });
}
