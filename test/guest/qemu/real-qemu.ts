/** A QEMU process with its QMP socket, always ended: by its id, whatever becomes of the test. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { QemuGuest } from '../../../src/guest/qemu/qemu-guest.ts';

export const QEMU = 'qemu-system-x86_64';

const READY_MS = 30_000;

export interface RealQemu extends AsyncDisposable {
  readonly socketPath: string;
  readonly process: ChildProcess;
  /** What it printed, for failures. */
  output(): string;
}

const running = new Set<ChildProcess>();

process.on('exit', () => {
  for (const child of running) child.kill('SIGKILL');
});

/** Where `startQemu` has the QMP socket of a guest in `directory`. */
export const qmpSocket = (directory: string): string => join(directory, 'qmp.sock');

/** The arguments behind `-qmp`. */
export const qmpArgument = (directory: string): string => `unix:${qmpSocket(directory)},server=on,wait=off`;

/** Start a program that becomes a QEMU with a QMP socket in `directory`; resolves when that answers. */
export async function startQemu(directory: string, program: string, args: readonly string[]): Promise<RealQemu> {
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  running.add(child);
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk: Buffer) => (output += chunk.toString()));
  }
  const ended = once(child, 'close').then(() => running.delete(child));
  const guest = new QemuGuest({ socketPath: qmpSocket(directory) });
  const qemu: RealQemu = {
    socketPath: qmpSocket(directory),
    process: child,
    output: () => output,
    async [Symbol.asyncDispose]() {
      // The program may be the parent of QEMU; QEMU's own socket reaches it.
      if (child.exitCode === null && child.signalCode === null) await guest.poweroff().catch(() => {});
      child.kill('SIGKILL');
      await ended;
    },
  };
  for (const deadline = Date.now() + READY_MS; (await guest.status()).state === 'off'; await sleep(20)) {
    if (child.exitCode === null && child.signalCode === null && Date.now() < deadline) continue;
    await qemu[Symbol.asyncDispose]();
    throw new Error(`${program} did not start:\n${output}`);
  }
  return qemu;
}
