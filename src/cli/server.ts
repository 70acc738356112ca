/** The serving process: opens all disks, mounts the tree, and ends it cleanly when asked to. */
import { realpathSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { openAttachedDisk } from '../disk/attached-disk.ts';
import type { Disk } from '../disk/disk.ts';
import { openDisk } from '../disk/open-disk.ts';
import { FsError } from '../errors.ts';
import type { Driver, Mounted } from '../fuse/driver.ts';
import { unmountCommand } from '../fuse/mount-command.ts';
import { mountAt } from '../fuse/mount-list.ts';
import { mountingWay } from '../fuse/mounting.ts';
import { usersOf } from '../fuse/open-files.ts';
import { runCommand } from '../os/run-command.ts';
import { createTree, type Tree } from '../tree/tree.ts';
import type { DriverName } from './driver-name.ts';
import { exitStatus, sentenceOf } from './failure.ts';
import type { GuestAddresses } from './guest-options.ts';
import { withMountOf } from './image-target.ts';
import { disksToMount, type SourceDisk } from './images.ts';
import { say } from './log.ts';
import { Guests } from './machines.ts';
import { prepareMountpoint } from './mountpoint.ts';
import { processStart } from './process.ts';
import type { ServerMessage } from './server-message.ts';
import { removeState, type ServerState, servedImage, stateDirectory, writeState } from './state.ts';
import { type StopSignals, watchStopSignals } from './stop-signals.ts';

export interface ServeOptions {
  /** Image files and directories with images. */
  readonly sources: readonly string[];
  readonly mountpoint: string;
  readonly driver: DriverName;
  readonly readOnly: boolean;
  readonly allowOther: boolean;
  readonly replace: boolean;
  /** Data threads. */
  readonly threads: number;
  /** How long one of them looks for the next request before it sleeps. */
  readonly pollMicroseconds: number;
  /** For the metadata of each disk, in bytes. */
  readonly cacheBytes: number | undefined;
  /** Folders with images that may be built on these. Absolute, as the next. */
  readonly backingRoots: readonly string[];
  /** Where new overlays go; undefined: beside the image. */
  readonly overlayFolder: string | undefined;
  readonly guests: GuestAddresses;
  /** Disks whose images their guests have open. */
  readonly attached: ReadonlySet<string>;
  readonly guestTimeoutMs: number;
  /** Absolute path. */
  readonly guestConfig: string | undefined;
  /** The one who started this process goes on without it as soon as the tree answers. */
  readonly detached: boolean;
}

/** Time for requests under way to end, after the kernel has let go of them. */
const LAST_REQUESTS_MS = 2000;

/**
 * Serve until the mount ends. All disks are opened before anything is mounted: a failure leaves nothing behind.
 * @throws FsError before the tree answers, and when not all could be written out at the end
 */
export async function serve(options: ServeOptions): Promise<void> {
  const signals = watchStopSignals();
  const sources = await disksToMount(options.sources);
  const guests = new Guests({ guests: options.guests, configFile: options.guestConfig });
  stateDirectory(); // unusable, it is better known before anything is mounted
  const mountpoint = await prepareMountpoint(options.mountpoint, options);
  const disks: Disk[] = [];
  let tree: Tree | undefined;
  let mounted: Mounted;
  try {
    for (const source of sources) {
      refuseIfStopped(signals);
      disks.push(await openSource(source, guests, mountpoint, options));
    }
    const names = disks.map(({ name }) => name);
    tree = createTree(disks, {
      machines: guests.machinesOf(names, { timeoutMs: options.guestTimeoutMs, mountpoint }),
    });
    mounted = await mountTree(tree, disks, mountpoint, options);
  } catch (error) {
    tree?.close();
    for (const disk of disks) await disk.close().catch(() => {});
    throw error;
  }
  const state = describeServer(disks, mountpoint, options);
  try {
    writeState(state);
  } catch (error) {
    say(`\`vdskfs status\` will not know this mount: ${sentenceOf(error)}`);
  }
  const cutOff = new Promise<void>((resolve) => {
    signals.listen(async (count) => {
      if (await endAsWished(count, mounted, mountpoint)) resolve();
    });
  });
  if (options.detached) {
    process.off('disconnect', orphaned);
    process.chdir('/'); // or the folder it was started in could not be unmounted
  } else {
    say(`mounted at ${mountpoint}; Ctrl-C ends it`);
  }
  await announce({ kind: 'ready', mountpoint });

  // fuse-native learns of the end only when the last file is closed, which after a cut may be long.
  await Promise.race([mounted.ended, cutOff.then(() => sleep(LAST_REQUESTS_MS))]);
  tree.close();
  await closeAll(disks, state);
}

function refuseIfStopped(signals: StopSignals): void {
  if (signals.count > 0) throw new FsError('EINTR', 'stopped by a signal before anything was mounted');
}

/** A disk is attached where that was said, and where its image is locked while there is a guest who may have locked it. */
async function openSource(
  source: SourceDisk,
  guests: Guests,
  mountpoint: string,
  options: ServeOptions,
): Promise<Disk> {
  const { image, name } = source;
  const { readOnly, cacheBytes, backingRoots, overlayFolder, guestTimeoutMs: timeoutMs } = options;
  const common = { backingRoots, avoid: [mountpoint], ...(cacheBytes !== undefined && { cacheBytes }) };
  const attach = () =>
    openAttachedDisk(image, { ...common, name, timeoutMs, guest: () => guests.holderOf(name, image) });
  if (options.attached.has(name)) return attach();
  try {
    return await openDisk(image, { ...common, readOnly, overlayFolder });
  } catch (error) {
    const locked = error instanceof FsError && error.errno === 'EBUSY' && servedImage(image) === undefined;
    if (locked && (await guests.mayHold(name))) return attach();
    throw withMountOf(image, error);
  }
}

async function mountTree(
  tree: Tree,
  disks: readonly Disk[],
  mountpoint: string,
  options: ServeOptions,
): Promise<Mounted> {
  const driver = await loadDriver(options.driver);
  const source = disks.length === 1 ? disks[0]!.imagePath : `${disks.length} disks`;
  const { readOnly, allowOther, threads, pollMicroseconds } = options;
  return driver(tree, { mountpoint, source, readOnly, allowOther, threads, pollMicroseconds });
}

/** Loaded when it is asked for: fuse-native is an optional package, and opens a library of the system. */
async function loadDriver(name: DriverName): Promise<Driver> {
  switch (name) {
    case 'native':
      return (await import('../fuse/native-driver.ts')).mountNative;
    case 'fuse-native':
      return (await import('../fuse/fuse-native-driver.ts')).mountFuseNative;
  }
}

function describeServer(disks: readonly Disk[], mountpoint: string, options: ServeOptions): ServerState {
  return {
    pid: process.pid,
    processStart: processStart(process.pid) ?? '',
    mountpoint,
    driver: options.driver,
    readOnly: options.readOnly,
    startedMs: Date.now(),
    disks: disks.map(({ name, imagePath }) => ({ name, image: realpathSync(imagePath) })),
  };
}

/** Tell whoever started this process. Resolves when it is on its way; that one may be gone already. */
function announce(message: ServerMessage): Promise<void> {
  return new Promise((resolve) => {
    if (process.send === undefined) resolve();
    else process.send(message, undefined, undefined, () => resolve());
  });
}

/**
 * The first wish unmounts, which the kernel refuses while something is open. Any other cuts off whoever has something
 * open: what was written stays written, and the disks are closed as always.
 * @returns whether the kernel sends no more requests from now on
 */
async function endAsWished(count: number, mounted: Mounted, mountpoint: string): Promise<boolean> {
  try {
    if (count === 1) {
      await mounted.unmount();
    } else {
      const users = await usersOf(mountpoint);
      const cut = await forceUnmount(mountpoint);
      if (users !== '') say(`${mountpoint}: ${cut ? 'cut off' : 'detached, still serving'} ${users}`);
      return cut;
    }
  } catch (error) {
    say(sentenceOf(error) + (count === 1 ? '; another signal cuts them off' : ''));
  }
  return false;
}

/**
 * Take the mount out of the tree and end its connection to the kernel, whatever is open.
 * @returns false if the connection goes on until the last file is closed
 */
async function forceUnmount(mountpoint: string): Promise<boolean> {
  const way = mountingWay();
  const command = unmountCommand(way, mountpoint, true);
  // umount's -f ends the connection; fusermount3 has nothing like it, the control file system has where it is mounted.
  const cut = way === 'linux-user' ? await abortConnection(mountpoint) : true;
  const args = way === 'linux-root' ? ['-f', ...command.args] : command.args;
  const { status, complaint } = await runCommand({ ...command, args });
  if (status !== 0) throw new FsError('EIO', `${mountpoint}: cannot be unmounted by force: ${complaint}`);
  return cut;
}

async function abortConnection(mountpoint: string): Promise<boolean> {
  const [, minor] = (await mountAt(mountpoint))?.device?.split(':') ?? [];
  try {
    await writeFile(`/sys/fs/fuse/connections/${minor}/abort`, '1');
    return true;
  } catch {
    return false;
  }
}

async function closeAll(disks: readonly Disk[], state: ServerState): Promise<void> {
  const failures: string[] = [];
  for (const disk of disks) {
    try {
      await disk.close();
    } catch (error) {
      failures.push(sentenceOf(error));
    }
  }
  if (failures.length === 0) return removeState(state.mountpoint);
  const failure = failures.join('; ');
  writeState({ ...state, failure });
  throw new FsError('EIO', failure);
}

/** Who waits for this process has died: no one would end it. */
function orphaned(): void {
  process.emit('SIGTERM', 'SIGTERM');
}

/** `serve` as the whole life of this process. */
export async function runServer(options: ServeOptions): Promise<void> {
  process.once('disconnect', orphaned);
  process.channel?.unref(); // it must not keep the process alive
  try {
    await serve(options);
  } catch (error) {
    await announce({ kind: 'failed', message: sentenceOf(error) });
    throw error;
  } finally {
    process.off('disconnect', orphaned);
    if (process.connected) process.disconnect();
  }
  // Everything is closed; what a driver may still hold must not keep the process.
  process.exit(exitStatus.DONE);
}
