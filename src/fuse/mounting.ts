/** Making a mount and undoing it, by the programs that the system has for it. */

import { close, constants, open } from 'node:fs';
import { stat } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { FsError } from '../errors.ts';
import { codeOf, fsErrorFrom } from '../os/errno.ts';
import { type Command, type CommandResult, runCommand } from '../os/run-command.ts';
import { systemCalls } from '../os/system-calls.ts';
import type { MountOptions } from './driver.ts';
import { freebsdMount, fusermountMount, linuxMount, unmountCommand, type Way } from './mount-command.ts';
import { canonical, findStaleMount, type MountEntry, mountAt } from './mount-list.ts';
import { usersOf } from './open-files.ts';

const openDescriptor = promisify(open);
const closeDescriptor = promisify(close);

const DEVICE = '/dev/fuse';

/** @throws FsError ENOTSUP on a system whose mounting programs are not known here */
export function mountingWay(): Way {
  switch (process.platform) {
    case 'linux':
      return process.geteuid?.() === 0 ? 'linux-root' : 'linux-user';
    case 'freebsd':
    case 'darwin':
      return process.platform;
    default:
      throw new FsError('ENOTSUP', `vdskfs cannot mount on ${process.platform}: it runs on Linux, FreeBSD and macOS`);
  }
}

/**
 * Mount, and return the device's descriptor, which the caller closes. Nobody needs to serve it yet.
 * @throws FsError with the mounting program's own words; ENOTSUP on macOS, whose device speaks otherwise
 */
export async function mountDevice(options: MountOptions, way: Way): Promise<number> {
  if (way === 'darwin')
    throw new FsError('ENOTSUP', 'the native driver does not run on macOS: use --driver fuse-native');
  await checkMountpoint(options.mountpoint);
  if (way === 'linux-user') return mountThroughFusermount(options);
  const fd = await openDevice(way);
  try {
    const owner = { uid: process.geteuid?.() ?? 0, gid: process.getegid?.() ?? 0 };
    const command = way === 'freebsd' ? freebsdMount(options, fd) : linuxMount(options, fd, owner);
    await mountBy(command, options.mountpoint);
    return fd;
  } catch (error) {
    await closeDescriptor(fd);
    throw error;
  }
}

/** A directory that answers. @throws FsError ENOENT, ENOTDIR, EBUSY for a stale mount */
export async function checkMountpoint(mountpoint: string): Promise<void> {
  if ((await findStaleMount(mountpoint)) !== undefined) {
    throw new FsError(
      'EBUSY',
      `'${mountpoint}' holds a mount whose server is dead: run 'vdskfs unmount ${mountpoint}', or mount with --replace`,
    );
  }
  const found = await stat(mountpoint).catch((error) => {
    throw fsErrorFrom(error, `cannot mount on '${mountpoint}'`);
  });
  if (!found.isDirectory()) {
    throw new FsError('ENOTDIR', `cannot mount on '${mountpoint}': it is not a directory`);
  }
}

async function openDevice(way: Way): Promise<number> {
  try {
    return await openDescriptor(DEVICE, constants.O_RDWR);
  } catch (error) {
    const module = way === 'freebsd' ? 'kldload fusefs' : 'modprobe fuse';
    if (codeOf(error) === 'ENOENT' || codeOf(error) === 'ENXIO') {
      throw new FsError('ENOTSUP', `there is no ${DEVICE}: run '${module}' as root`, { cause: error });
    }
    throw fsErrorFrom(error, `cannot open ${DEVICE}`);
  }
}

/** The program opens the device, mounts, and sends the descriptor as one byte with one SCM_RIGHTS message. */
async function mountThroughFusermount(options: MountOptions): Promise<number> {
  const { socketPair, receive } = systemCalls();
  const [ours, theirs] = socketPair('stream');
  try {
    await mountBy(fusermountMount(options, theirs), options.mountpoint);
    const { descriptors } = receive(ours, new Uint8Array(1), false);
    const [fd, ...others] = descriptors;
    for (const other of others) await closeDescriptor(other);
    if (fd === undefined) {
      throw new FsError('EIO', `fusermount3 mounted '${options.mountpoint}' but sent no descriptor of ${DEVICE}`);
    }
    return fd;
  } finally {
    await closeDescriptor(ours);
    await closeDescriptor(theirs);
  }
}

async function mountBy(command: Command, mountpoint: string): Promise<void> {
  const { status, complaint } = await run(command, `cannot mount on '${mountpoint}'`);
  if (status === 0) return;
  const errno = /permi(tted|ssion)|allow_other|must be root/i.test(complaint) ? 'EPERM' : 'EIO';
  throw new FsError(errno, `cannot mount on '${mountpoint}': ${said(command, status, complaint)}`);
}

/**
 * How long a mount may be busy without anybody who holds it: a process that ends closes its files late, and whoever looks
 * at another's open files, or starts a program, holds them for a moment.
 */
const UNEXPLAINED_MS = 1000;
const RETRY_MS = 20;

/**
 * Unmount. No failure if somebody was faster, perhaps with `umount -l`: the path is then free already.
 * @throws FsError EBUSY while files are open in it, with who holds them as far as that can be found out
 */
export async function unmountDevice(way: Way, mountpoint: string): Promise<void> {
  const path = await canonical(mountpoint);
  // Never what lies below: the directory may be the root of another file system.
  if (!(await mountAt(path))?.type.includes('fuse')) return;
  const command = unmountCommand(way, path, false);
  for (const deadline = Date.now() + UNEXPLAINED_MS; ; await sleep(RETRY_MS)) {
    const { status, complaint } = await run(command, `cannot unmount '${mountpoint}'`);
    if (status === 0 || /not mounted|not found/i.test(complaint)) return;
    if (!/busy/i.test(complaint)) {
      throw new FsError('EIO', `cannot unmount '${mountpoint}': ${said(command, status, complaint)}`);
    }
    const users = await usersOf(path);
    if (users === '' && Date.now() < deadline) continue;
    const who = users === '' ? 'files in it are open' : `files in it are open, held by ${users}`;
    throw new FsError('EBUSY', `cannot unmount '${mountpoint}': ${who}; close them and try again`);
  }
}

/**
 * Unmount, and wait until the kernel has let go of the mount, which `ended` tells.
 * @throws FsError EBUSY also if it does not: it is served on, and can be asked for again
 */
export async function unmountAndWait(way: Way, mountpoint: string, ended: Promise<void>): Promise<void> {
  await unmountDevice(way, mountpoint);
  if (!(await settles(ended, LETTING_GO_MS))) {
    throw new FsError(
      'EBUSY',
      `'${mountpoint}' is unmounted here, but files in it are still open, or another mount namespace still has it; ` +
        'it is served until they are closed',
    );
  }
}

const LETTING_GO_MS = 5000;

async function settles(promise: Promise<void>, withinMs: number): Promise<boolean> {
  const cancel = new AbortController();
  const late = sleep(withinMs, false, { signal: cancel.signal }).catch(() => false);
  const settled = await Promise.race([promise.then(() => true), late]);
  cancel.abort();
  return settled;
}

/** Take the mount out of the tree at once, whatever is open in it. For one that nobody serves any more. */
export async function clearStaleMount(stale: Pick<MountEntry, 'mountpoint'>): Promise<void> {
  const command = unmountCommand(mountingWay(), stale.mountpoint, true);
  const { status, complaint } = await run(command, `cannot unmount '${stale.mountpoint}'`);
  if (status !== 0) {
    throw new FsError('EIO', `cannot unmount '${stale.mountpoint}': ${said(command, status, complaint)}`);
  }
}

const said = ({ program }: Command, status: number, complaint: string): string =>
  complaint === '' ? `${program} ended with status ${status}` : complaint;

async function run(command: Command, what: string): Promise<CommandResult> {
  try {
    return await runCommand(command);
  } catch (error) {
    if (codeOf(error) !== 'ENOENT') throw fsErrorFrom(error, what);
    const packages = command.program === 'fusermount3' ? ': install the package fuse3' : '';
    throw new FsError('ENOTSUP', `${what}: there is no program ${command.program}${packages}`, { cause: error });
  }
}
