/**
 * What serving processes leave behind for other commands: per mount one JSON file and one log, in a directory that no
 * other user can write. The file is a hint; the process and the list of mounts have the last word.
 */
import { createHash } from 'node:crypto';
import {
  closeSync,
  constants,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { FsError } from '../errors.ts';
import { processStart } from './process.ts';

/** One mount, as its serving process describes it. */
export interface ServerState {
  readonly pid: number;
  /** Of that very process (`processStart`). */
  readonly processStart: string;
  readonly mountpoint: string;
  readonly driver: string;
  readonly readOnly: boolean;
  /** Milliseconds since the epoch. */
  readonly startedMs: number;
  readonly disks: readonly { readonly name: string; readonly image: string }[];
  /** Set when the process ended and could not write everything out. */
  readonly failure?: string;
}

/** Where states and logs are, made on the first call. @throws FsError EPERM if someone else owns that place */
export function stateDirectory(): string {
  const directory = stateDirectoryPath();
  mkdirSync(directory, { recursive: true, mode: 0o700 });
  const { uid, mode } = lstatSync(directory);
  if (uid !== process.getuid?.() || (mode & 0o022) !== 0 || (mode & constants.S_IFMT) !== constants.S_IFDIR) {
    throw new FsError('EPERM', `${directory}: must be a directory of yours that no one else can write; remove it`);
  }
  return directory;
}

function stateDirectoryPath(): string {
  const { VDSKFS_STATE_DIR: given, XDG_RUNTIME_DIR: runtime } = process.env;
  if (given) return given;
  const uid = process.getuid?.() ?? 0;
  if (uid === 0) return process.platform === 'linux' ? '/run/vdskfs' : '/var/run/vdskfs';
  return runtime ? join(runtime, 'vdskfs') : join(tmpdir(), `vdskfs-${uid}`);
}

const SUFFIX = '.json';
const keyOf = (mountpoint: string): string => createHash('sha256').update(mountpoint).digest('hex').slice(0, 16);
const stateFile = (mountpoint: string): string => join(stateDirectory(), keyOf(mountpoint) + SUFFIX);

/** The log of the detached server of `mountpoint`. */
export const logFile = (mountpoint: string): string => join(stateDirectory(), `${keyOf(mountpoint)}.log`);

/**
 * The log for a new server of `mountpoint`: `fresh`, or the one that a running server writes still.
 * @returns its descriptor, the caller's to close
 */
export function openLog(mountpoint: string): { readonly fd: number; readonly fresh: boolean } {
  const { O_WRONLY, O_CREAT, O_TRUNC, O_APPEND, O_NOFOLLOW } = constants;
  const state = readState(mountpoint);
  const fresh = state === undefined || !isServing(state);
  const flags = O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | (fresh ? O_TRUNC : 0);
  return { fd: openSync(logFile(mountpoint), flags, 0o600), fresh };
}

/** Publish the state of a mount; readers see the old file or the new one, never a part. */
export function writeState(state: ServerState): void {
  const path = stateFile(state.mountpoint);
  const fresh = `${path}.${process.pid}`;
  const fd = openSync(fresh, 'w', 0o600);
  try {
    writeFileSync(fd, `${JSON.stringify(state, null, 2)}\n`);
  } finally {
    closeSync(fd);
  }
  renameSync(fresh, path);
}

/** The mount is no more. Its log stays if there is anything in it. */
export function removeState(mountpoint: string): void {
  rmSync(stateFile(mountpoint), { force: true });
  if (statSync(logFile(mountpoint), { throwIfNoEntry: false })?.size === 0) removeLog(mountpoint);
}

export const removeLog = (mountpoint: string): void => rmSync(logFile(mountpoint), { force: true });

/** The state of `mountpoint`, whether or not its process still runs. */
export const readState = (mountpoint: string): ServerState | undefined => parseState(stateFile(mountpoint));

/** All states, those of ended processes too. */
export function readStates(): ServerState[] {
  const directory = stateDirectory();
  return readdirSync(directory)
    .filter((name) => name.endsWith(SUFFIX))
    .map((name) => parseState(join(directory, name)))
    .filter((state) => state !== undefined);
}

export const isServing = (state: ServerState): boolean => processStart(state.pid) === state.processStart;

function parseState(path: string): ServerState | undefined {
  try {
    const state = JSON.parse(readFileSync(path, 'utf8')) as ServerState;
    return typeof state.pid === 'number' && Array.isArray(state.disks) ? state : undefined;
  } catch {
    return undefined; // not there, or of another version: as good as none
  }
}

/** The running mount that serves the image `path`, if any. Never fails: it only makes messages better. */
export function servedImage(path: string): { pid: number; mountpoint: string; directory: string } | undefined {
  try {
    const real = realpathSync(path);
    for (const state of readStates()) {
      const disk = state.disks.find(({ image }) => image === real);
      if (disk !== undefined && isServing(state)) {
        return { pid: state.pid, mountpoint: state.mountpoint, directory: join(state.mountpoint, disk.name) };
      }
    }
  } catch {
    // No state directory, or no such file: then no mount of ours is known.
  }
  return undefined;
}
