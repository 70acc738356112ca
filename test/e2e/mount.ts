/**
 * The compiled command line under test (`npm run build` first), and mounts that always end: stopped cleanly when the
 * body is done, killed by their id otherwise. The server is a process of its own, so a test may use blocking calls.
 */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { mkdir, rmdir } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { isServerMessage } from '../../src/cli/server-message.ts';
import { type Finished, type RunOptions, run, runOk, withDirectory } from './run.ts';

export type DriverName = 'native' | 'fuse-native';

/** The driver that this run of the tests is about: the suites run once with each. */
export const driver: DriverName = process.env.VDSKFS_DRIVER === 'fuse-native' ? 'fuse-native' : 'native';

/** The program, run by Node. */
export const launcher = fileURLToPath(new URL('../../bin/vdskfs', import.meta.url));
const STOP_MS = 30_000;

/** Run one command of vdskfs to its end. */
export const vdskfs = (args: readonly string[], options?: RunOptions): Promise<Finished> =>
  run(process.execPath, [launcher, ...args], options);

export interface MountOptions {
  readonly driver?: DriverName;
  /** More words for `vdskfs mount`, such as `--read-only`. */
  readonly args?: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  /** Mount here instead of in a fresh directory; it must exist and stays. */
  readonly mountpoint?: string;
}

export interface MountedTree {
  readonly mountpoint: string;
  readonly driver: DriverName;
  /** The serving process. */
  readonly pid: number;
  /** A path in the tree: `path('vm1', 'disk.raw')`. */
  path(...names: string[]): string;
  /** What the server has printed so far, both streams. */
  log(): string;
  /** Send a signal and nothing else. */
  signal(name: NodeJS.Signals): void;
  /** Resolves when the serving process has ended. */
  readonly ended: Promise<{ readonly status: number | null; readonly signal: NodeJS.Signals | null }>;
}

/** Mount, run `body`, unmount: the server must then end with status 0, else the test fails with its log. */
export function withMount<T>(
  images: string | readonly string[],
  options: MountOptions,
  body: (tree: MountedTree) => Promise<T>,
): Promise<T> {
  const given = options.mountpoint;
  if (given !== undefined) return serveWhile(images, given, options, body);
  return withDirectory(async (directory) => {
    const mountpoint = join(directory, 'mnt');
    await mkdir(mountpoint);
    const result = await serveWhile(images, mountpoint, options, body);
    await rmdir(mountpoint); // fails if anything is still mounted there
    return result;
  });
}

async function serveWhile<T>(
  images: string | readonly string[],
  mountpoint: string,
  options: MountOptions,
  body: (tree: MountedTree) => Promise<T>,
): Promise<T> {
  const tree = await startServer(typeof images === 'string' ? [images] : images, mountpoint, options);
  let result: T;
  try {
    result = await body(tree);
  } catch (error) {
    await stop(tree).catch(() => {}); // the body's failure is the one to report
    throw error instanceof Error ? withLog(error, tree) : error;
  }
  await stop(tree);
  return result;
}

function withLog(error: Error, tree: MountedTree): Error {
  if (tree.log() !== '') error.message += `\n--- the server's log ---\n${tree.log()}`;
  return error;
}

const running = new Map<ChildProcess, string>();

// A worker that ends early (a crash, a signal) must not leave its mounts behind.
process.on('exit', () => {
  for (const [child, mountpoint] of running) {
    child.kill('SIGKILL');
    spawnSync('umount', ['-l', mountpoint]);
  }
});

/** Start a serving process; resolves when the tree answers. The caller ends it: `withMount` is the usual way. */
export function startServer(
  images: readonly string[],
  mountpoint: string,
  options: MountOptions,
): Promise<MountedTree> {
  const chosen = options.driver ?? driver;
  const args = ['mount', '--foreground', '--driver', chosen, ...(options.args ?? []), ...images, mountpoint];
  const child = spawn(process.execPath, [launcher, ...args], {
    stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
    env: { ...process.env, ...options.env },
  });
  running.set(child, mountpoint);
  let log = '';
  child.stdout?.on('data', (chunk: Buffer) => {
    log += chunk.toString();
  });
  child.stderr?.on('data', (chunk: Buffer) => {
    log += chunk.toString();
  });
  const ended = new Promise<{ status: number | null; signal: NodeJS.Signals | null }>((resolve) => {
    child.on('close', (status, signal) => {
      running.delete(child);
      resolve({ status, signal });
    });
  });
  const tree: MountedTree = {
    mountpoint,
    driver: chosen,
    pid: child.pid ?? 0,
    path: (...names) => join(mountpoint, ...names),
    log: () => log,
    signal: (name) => void child.kill(name),
    ended,
  };
  return new Promise((resolve, reject) => {
    child.on('error', reject);
    child.on('message', (message) => {
      if (isServerMessage(message) && message.kind === 'ready') resolve(tree);
    });
    void ended.then(({ status, signal }) => reject(new Error(`the mount failed: ${signal ?? status}\n${log}`)));
  });
}

/** End a server as SIGTERM does. @throws with its log if it does not end, or not with status 0 */
export async function stop(tree: MountedTree): Promise<void> {
  tree.signal('SIGTERM');
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    tree.signal('SIGKILL');
    spawnSync('umount', ['-l', tree.mountpoint]);
  }, STOP_MS);
  const { status, signal } = await tree.ended;
  clearTimeout(timer);
  // A test that killed the server itself leaves the dead mount to us.
  if (signal !== null) spawnSync('umount', ['-l', tree.mountpoint]);
  if (late) throw new Error(`the server did not end within ${STOP_MS} ms of SIGTERM\n${tree.log()}`);
  if (status !== 0 && signal !== 'SIGKILL') throw new Error(`the server ended with ${signal ?? status}\n${tree.log()}`);
}

export interface LoopOptions {
  readonly readOnly?: boolean;
  /** Also make devices for the partitions: DEVICEp1, DEVICEp2 … */
  readonly partitions?: boolean;
  /** Loop over the file with direct I/O. */
  readonly direct?: boolean;
}

/** A loop device over `file` for `body`, always detached. */
export async function withLoop<T>(
  file: string,
  options: LoopOptions,
  body: (device: string) => Promise<T>,
): Promise<T> {
  const args = ['--find', '--show'];
  if (options.readOnly) args.push('--read-only');
  if (options.partitions) args.push('--partscan');
  if (options.direct) args.push('--direct-io=on');
  const device = (await runOk('losetup', [...args, file])).trim();
  try {
    return await body(device);
  } finally {
    await runOk('losetup', ['--detach', device]);
  }
}

/** A block device's file system, mounted for `body` on a fresh directory. `options`: as after mount -o. */
export function withFileSystem<T>(
  device: string,
  options: string,
  body: (directory: string) => Promise<T>,
): Promise<T> {
  return withDirectory(async (parent) => {
    const directory = join(parent, 'fs');
    await mkdir(directory);
    await runOk('mount', ['-o', options, device, directory]);
    try {
      return await body(directory);
    } finally {
      await runOk('umount', [directory]);
    }
  });
}
