/** Other programs: run to their end, or kept running and always ended. */
import { type ChildProcess, type SpawnOptions, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';

const STOP_MS = 20_000;

/** Run a program to its end without blocking ours. @throws with all it said if it fails */
export async function run(command: string, args: readonly string[]): Promise<string> {
  const child = start(command, args);
  const { status, signal } = await child.ended;
  if (status !== 0) throw new Error(`${command} ${args.join(' ')}: ${signal ?? status}\n${child.output()}`);
  return child.output();
}

/** The same, timed. @returns milliseconds */
export async function timed(work: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await work();
  return performance.now() - start;
}

export interface Running {
  readonly pid: number;
  /** What it printed so far. */
  output(): string;
  readonly ended: Promise<{ readonly status: number | null; readonly signal: NodeJS.Signals | null }>;
  readonly hasEnded: () => boolean;
  readonly process: ChildProcess;
}

const alive = new Set<Running>();
const mounts = new Set<string>();

export function start(command: string, args: readonly string[], options: SpawnOptions = {}): Running {
  const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe'], ...options });
  let output = '';
  let finished = false;
  for (const stream of [child.stdout, child.stderr]) {
    stream?.on('data', (chunk: Buffer) => {
      output += chunk.toString();
    });
  }
  const ended = new Promise<{ status: number | null; signal: NodeJS.Signals | null }>((resolve) => {
    const finish = (status: number | null, signal: NodeJS.Signals | null): void => {
      finished = true;
      alive.delete(running);
      resolve({ status, signal });
    };
    child.on('close', finish);
    child.on('error', (error) => {
      output += error.message;
      finish(127, null);
    });
  });
  const running: Running = {
    pid: child.pid ?? 0,
    output: () => output,
    ended,
    hasEnded: () => finished,
    process: child,
  };
  alive.add(running);
  return running;
}

/** Ask it to stop; make it, if it does not. */
export async function stop(running: Running): Promise<void> {
  if (running.hasEnded()) return;
  running.process.kill('SIGTERM');
  const late = delay(STOP_MS, 'late', { ref: false });
  if ((await Promise.race([running.ended, late])) === 'late') {
    running.process.kill('SIGKILL');
    await running.ended;
  }
}

/** `path` is being mounted: should we end before `unmounted`, it is unmounted. */
export const mounting = (path: string): void => void mounts.add(path);

/** Make sure that nothing is mounted there, whatever its server did. */
export function unmounted(path: string): void {
  mounts.delete(path);
  // Fails where nothing is mounted, which is how it should be.
  spawnSync('umount', ['-l', path], { stdio: 'ignore' });
}

/** The last resort, when we end at once: servers and mounts go with us. */
export function endEverything(): void {
  for (const { process: child } of alive) child.kill('SIGKILL');
  for (const path of [...mounts]) unmounted(path);
}

/** Most memory the process ever had resident, in bytes (VmHWM of proc(5)); 0 if it is gone. */
export function peakMemory(pid: number): number {
  try {
    const line = /^VmHWM:\s*(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'));
    return Number(line?.[1] ?? 0) * 1024;
  } catch {
    return 0;
  }
}

/** Messages of a forked process, one at a time. */
export async function nextMessage<T>(child: ChildProcess): Promise<T> {
  const [message] = await once(child, 'message');
  return message as T;
}
