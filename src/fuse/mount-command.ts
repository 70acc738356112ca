/** The programs that mount and unmount, and their options: pure, one function per way. */

import type { Command } from '../os/run-command.ts';
import type { MountOptions } from './driver.ts';
import { REQUEST_BYTES } from './init.ts';

/** Shown behind `fuse.` (Linux) or `fusefs.` (FreeBSD) as the mount's type; how mounts are found again. */
export const SUBTYPE = 'vdskfs';

/** Where a program finds the descriptor that `Command.inherited` names. */
const INHERITED = 3;

type Mountable = Pick<MountOptions, 'mountpoint' | 'source' | 'readOnly' | 'allowOther'>;

/**
 * Options that all ways have in common. Whoever lets others in has the kernel check mode bits: this side answers
 * whoever gets through. `max_read` caps a READ where max_pages does not: on FreeBSD, and with pages over 4 KiB.
 */
const commonOptions = ({ readOnly, allowOther }: Mountable): string[] => [
  ...(readOnly ? ['ro'] : []),
  ...(allowOther ? ['allow_other', 'default_permissions'] : []),
  `max_read=${REQUEST_BYTES}`,
];

/** A comma ends an option, a backslash protects it (mount.fuse(8), option fsname). */
export const escapedOption = (text: string): string => text.replace(/[\\,]/g, '\\$&');

/**
 * Linux, as root: mount(8) with the open device. `-i` keeps it from running mount.fuse3, which would take the source
 * for a program. `owner`: the user whom the tree belongs to.
 */
export function linuxMount(options: Mountable, deviceFd: number, owner: { uid: number; gid: number }): Command {
  const list = [
    `fd=${INHERITED}`,
    'rootmode=40000',
    `user_id=${owner.uid}`,
    `group_id=${owner.gid}`,
    'nosuid',
    'nodev',
    ...commonOptions(options),
  ];
  return {
    program: 'mount',
    args: ['-i', '-t', `fuse.${SUBTYPE}`, '-o', list.join(','), '--', options.source, options.mountpoint],
    inherited: deviceFd,
  };
}

/** Linux, as an ordinary user: fusermount3 opens the device itself and sends it through the socket `socketFd`. */
export function fusermountMount(options: Mountable, socketFd: number): Command {
  const list = [`fsname=${escapedOption(options.source)}`, `subtype=${SUBTYPE}`, ...commonOptions(options)];
  return {
    program: 'fusermount3',
    args: ['-o', list.join(','), '--', options.mountpoint],
    env: { _FUSE_COMMFD: String(INHERITED) },
    inherited: socketFd,
  };
}

/** FreeBSD: mount_fusefs with the open device; the environment tells it that no daemon is to be started. */
export function freebsdMount(options: Mountable, deviceFd: number): Command {
  const list = [`subtype=${SUBTYPE}`, `fsname=${escapedOption(options.source)}`, 'nosuid', ...commonOptions(options)];
  return {
    program: 'mount_fusefs',
    args: ['-o', list.join(','), String(INHERITED), options.mountpoint],
    env: { MOUNT_FUSEFS_SAFE: '1', MOUNT_FUSEFS_CALL_BY_LIB: '1' },
    inherited: deviceFd,
  };
}

/** Whose programs mount and unmount here. */
export type Way = 'linux-root' | 'linux-user' | 'freebsd' | 'darwin';

/**
 * Unmount. The two for Linux ask nothing of the mount (umount(8) without `-c` would stat it first, which a server
 * that waits for the program cannot answer). `lazy`: at once from the tree, even if it is busy.
 */
export function unmountCommand(way: Way, mountpoint: string, lazy: boolean): Command {
  switch (way) {
    case 'linux-root':
      return { program: 'umount', args: ['-c', '-i', ...(lazy ? ['-l'] : []), '--', mountpoint] };
    case 'linux-user':
      return { program: 'fusermount3', args: ['-u', ...(lazy ? ['-z'] : []), '--', mountpoint] };
    case 'freebsd':
    case 'darwin':
      return { program: 'umount', args: [...(lazy ? ['-f'] : []), mountpoint] };
  }
}
