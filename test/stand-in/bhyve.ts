/**
 * Guests for tests: bhyve.c, compiled on the spot, as processes that always end with the test. It plays bhyve in all
 * generations, and bhyvectl.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdir, readFile, symlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { run, runOk } from '../e2e/run.ts';

export type Generation = 'A' | 'B' | 'C' | 'D' | 'E' | 'none';

/** A host with bhyve, in a folder. */
export interface BhyveHost {
  /** The programs: bhyve, and what was asked for. */
  readonly bin: string;
  readonly runDirectory: string;
  /** For whoever runs on this host. */
  readonly env: Readonly<Record<string, string>>;
  /** Lines of arguments that bhyvectl was called with. */
  bhyvectlCalls(): Promise<string[]>;
}

export interface HostOptions {
  readonly generation?: Generation;
  /** bhyvectl is installed. */
  readonly bhyvectl?: boolean;
  /** The host says which release it is; else it is a host without kern.osreldate. */
  readonly osreldate?: number;
}

const SOURCE = fileURLToPath(new URL('bhyve.c', import.meta.url));

/** Releases that speak each generation; 13.0 for those that 13.0 and main before it spoke. */
export const OSRELDATES = {
  A: 1_300_139,
  B: 1_400_010,
  C: 1_302_001,
  D: 1_400_097,
  E: 1_500_500,
  none: 1_400_097,
} as const;

let compiled: Promise<Buffer> | undefined;

/** The program's bytes, compiled once, in `directory`. */
function program(directory: string): Promise<Buffer> {
  const file = join(directory, 'stand-in');
  compiled ??= runOk('cc', ['-O2', '-Wall', '-Werror', '-pthread', '-o', file, SOURCE]).then(() => readFile(file));
  return compiled;
}

/** Install the stand-in in `directory`, which should have a short path: sockets are in it. */
export async function installBhyve(directory: string, options: HostOptions = {}): Promise<BhyveHost> {
  const bin = join(directory, 'bin');
  const runDirectory = join(directory, 'run');
  const log = join(directory, 'bhyvectl.log');
  await mkdir(bin);
  await mkdir(runDirectory);
  await writeFile(join(bin, 'bhyve'), await program(directory), { mode: 0o755 });
  if (options.bhyvectl) await symlink('bhyve', join(bin, 'bhyvectl'));
  const answer = options.osreldate === undefined ? 'exit 1' : `echo ${options.osreldate}`;
  await writeFile(join(bin, 'sysctl'), `#!/bin/sh\n${answer}\n`, { mode: 0o755 });
  return {
    bin,
    runDirectory,
    env: {
      PATH: `${bin}:${process.env.PATH}`,
      BHYVE_GENERATION: options.generation ?? 'D',
      BHYVECTL_LOG: log,
      VDSKFS_BHYVE_RUNDIR: runDirectory,
    },
    async bhyvectlCalls() {
      const text = await readFile(log, 'utf8').catch(() => '');
      return text.split('\n').filter((line) => line !== '');
    },
  };
}

export interface GuestOptions {
  readonly disks: readonly string[];
  readonly memoryBytes?: number;
  /** Writers of each disk. */
  readonly threads?: number;
  /** Pause of a writer between two writes. */
  readonly delayUs?: number;
  /** Words before the devices: `-r FILE`. */
  readonly args?: readonly string[];
  /** Its working directory: where it would write what it should not. */
  readonly cwd?: string;
}

/** What can go wrong at the next checkpoint; steps as the stand-in numbers them, like bhyve's documentation. */
export type Fault =
  | 'fine'
  | `die ${number}`
  | `hang ${number}`
  /** A device that it cannot save, found after the memory was written. */
  | 'unsavable'
  | 'nonsense'
  | 'short'
  | 'refuse'
  /** It goes on running while it is saved: what must never be. */
  | 'unpaused';

export interface RunningGuest {
  readonly name: string;
  readonly pid: number;
  /** What it has printed, one line for each thing that happened. */
  lines(): readonly string[];
  /** The first line from `start` on that begins with `word`. @throws if the guest ends before */
  line(word: string, start?: number): Promise<string>;
  setFault(fault: Fault): Promise<void>;
  kill(signal?: NodeJS.Signals): void;
  /** Exit status, or null when a signal ended it. */
  readonly ended: Promise<number | null>;
}

const running = new Set<ChildProcess>();
process.on('exit', () => {
  for (const child of running) child.kill('SIGKILL');
});

/** Start a guest; resolves when it runs, or, with `-r`, when it was restored. The caller ends it: see `withGuest`. */
export async function startGuest(host: BhyveHost, name: string, options: GuestOptions): Promise<RunningGuest> {
  const faults = join(host.runDirectory, `${name}.fault`);
  await writeFile(faults, 'fine');
  const { disks, memoryBytes = 1 << 20, threads = 2, delayUs } = options;
  const devices = disks.flatMap((disk, index) => ['-s', `${index + 3},virtio-blk,${disk}`]);
  const args = ['-A', '-H', '-o', `rundir=${host.runDirectory}`, '-m', String(memoryBytes), ...devices];
  const child = spawn(join(host.bin, 'bhyve'), [...(options.args ?? []), ...args, name], {
    env: {
      ...process.env,
      ...host.env,
      BHYVE_FAULT: faults,
      BHYVE_THREADS: String(threads),
      ...(delayUs === undefined ? {} : { BHYVE_DELAY_US: String(delayUs) }),
    },
    cwd: options.cwd,
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  running.add(child);
  let text = '';
  let complaint = '';
  const waiting = new Set<() => void>();
  const wake = (): void => {
    for (const one of waiting) one();
  };
  child.stdout.setEncoding('utf8').on('data', (part: string) => {
    text += part;
    wake();
  });
  child.stderr.setEncoding('utf8').on('data', (part: string) => {
    complaint += part;
  });
  let over = false;
  const ended = new Promise<number | null>((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (status) => {
      over = true;
      running.delete(child);
      resolve(status);
      wake();
    });
  });
  const lines = (): string[] => text.split('\n').slice(0, -1);
  const guest: RunningGuest = {
    name,
    pid: child.pid ?? 0,
    lines,
    async line(word, start = 0) {
      for (;;) {
        const found = lines()
          .slice(start)
          .find((line) => line.startsWith(word));
        if (found !== undefined) return found;
        if (over) throw new Error(`the guest '${name}' ended without '${word}':\n${text}${complaint}`);
        await new Promise<void>((resolve) => {
          const once = (): void => {
            waiting.delete(once);
            resolve();
          };
          waiting.add(once);
        });
      }
    },
    setFault: (fault) => writeFile(faults, fault),
    kill: (signal = 'SIGKILL') => void child.kill(signal),
    ended,
  };
  await guest.line('ready');
  return guest;
}

/**
 * Compare a saved memory with disks, block for block, as a restore does. Resolves with what the stand-in said:
 * "restored N" if all N blocks are what the memory says, else "inconsistent …".
 */
export async function compareState(host: BhyveHost, statePath: string, disks: readonly string[]): Promise<string> {
  const devices = disks.flatMap((disk, index) => ['-s', `${index + 3},virtio-blk,${disk}`]);
  const { stdout, stderr } = await run(join(host.bin, 'bhyve'), ['-r', statePath, ...devices, 'compare'], {
    env: { ...host.env, BHYVE_COMPARE: '1' },
  });
  return `${stdout}${stderr}`.trim();
}

/** A guest for `body`, gone afterwards. */
export async function withGuest<T>(
  host: BhyveHost,
  name: string,
  options: GuestOptions,
  body: (guest: RunningGuest) => Promise<T>,
): Promise<T> {
  const guest = await startGuest(host, name, options);
  try {
    return await body(guest);
  } finally {
    guest.kill();
    await guest.ended;
  }
}
