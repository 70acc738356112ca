/** Which mounts of vdskfs this host has, read without touching any of them: one whose server hangs would not answer. */

import { readFile, realpath, stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { codeOf } from '../os/errno.ts';
import { runCommand } from '../os/run-command.ts';
import { SUBTYPE } from './mount-command.ts';

export interface MountEntry {
  readonly mountpoint: string;
  readonly source: string;
  readonly readOnly: boolean;
  /** `fuse.vdskfs`, `fusefs.vdskfs`, … */
  readonly type: string;
  /** `MAJOR:MINOR`, the name of the mount in /sys/class/bdi; Linux only. */
  readonly device: string | undefined;
}

/** Mounts of vdskfs, in the order they were made. */
export async function listMounts(): Promise<MountEntry[]> {
  const mounts = await allMounts();
  return mounts.filter(({ type }) => type === `fuse.${SUBTYPE}` || type === `fusefs.${SUBTYPE}`);
}

async function allMounts(): Promise<MountEntry[]> {
  if (process.platform === 'linux') return parseMountinfo(await readFile('/proc/self/mountinfo', 'utf8'));
  const freebsd = process.platform === 'freebsd';
  const { stdout } = await runCommand({ program: 'mount', args: freebsd ? ['-p'] : [] });
  return freebsd ? parseFstab(stdout) : parseMount(stdout);
}

/**
 * /proc/self/mountinfo (proc_pid_mountinfo(5)): id, parent, major:minor, root, mount point, options, optional fields,
 * a hyphen, type, source, super options.
 */
export function parseMountinfo(text: string): MountEntry[] {
  return lines(text).flatMap((line) => {
    const [front, back] = line.split(' - ', 2);
    const [, , device, , mountpoint, options] = front?.split(' ') ?? [];
    const [type, source] = back?.split(' ') ?? [];
    if (mountpoint === undefined || type === undefined) return [];
    return [
      {
        mountpoint: unescaped(mountpoint),
        source: unescaped(source ?? ''),
        readOnly: options?.split(',').includes('ro') ?? false,
        type,
        device,
      },
    ];
  });
}

/** `mount -p` of FreeBSD: lines as in fstab(5). */
export function parseFstab(text: string): MountEntry[] {
  return lines(text).flatMap((line) => {
    const [source, mountpoint, type, options] = line.split(/\s+/);
    if (source === undefined || mountpoint === undefined || type === undefined) return [];
    return [
      {
        mountpoint: unescaped(mountpoint),
        source: unescaped(source),
        readOnly: options?.split(',').includes('ro') ?? false,
        type,
        device: undefined,
      },
    ];
  });
}

/** `mount` of macOS: `SOURCE on PATH (TYPE, OPTION, …)`. */
export function parseMount(text: string): MountEntry[] {
  return lines(text).flatMap((line) => {
    const [, source, mountpoint, list] = /^(.*?) on (.*) \((.*)\)$/.exec(line) ?? [];
    if (source === undefined || mountpoint === undefined || list === undefined) return [];
    const [type = '', ...options] = list.split(', ');
    return [{ mountpoint, source, readOnly: options.includes('read-only'), type, device: undefined }];
  });
}

const lines = (text: string): string[] => text.split('\n').filter((line) => line !== '');

/** Space, tab, newline and backslash are written as backslash and three octal digits. */
const unescaped = (text: string): string => {
  const bytes = Buffer.from(text, 'utf8')
    .toString('latin1')
    .replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)));
  return Buffer.from(bytes, 'latin1').toString('utf8');
};

/** The path as the list of mounts has it: symbolic links resolved, the last component left alone. */
export async function canonical(mountpoint: string): Promise<string> {
  try {
    return await realpath(mountpoint);
  } catch {
    // A stale mount cannot be looked at itself; its parent can.
    try {
      return join(await realpath(dirname(mountpoint)), basename(mountpoint));
    } catch {
      return mountpoint;
    }
  }
}

/** The mount on top at that path, of whatever type. */
export async function mountAt(mountpoint: string): Promise<MountEntry | undefined> {
  const path = await canonical(mountpoint);
  return (await allMounts()).findLast((mount) => mount.mountpoint === path);
}

/** The mount at `mountpoint` whose server is dead: every access fails with ENOTCONN until it is unmounted. */
export async function findStaleMount(mountpoint: string): Promise<MountEntry | undefined> {
  try {
    // FreeBSD makes up attributes for the root of a dead mount; names in it fail.
    await stat(process.platform === 'freebsd' ? join(mountpoint, 'README') : mountpoint);
    return undefined;
  } catch (error) {
    if (!STALE_CODES.includes(codeOf(error) ?? '')) return undefined;
  }
  const mount = await mountAt(mountpoint);
  return mount?.type.startsWith('fuse') ? mount : undefined;
}

/** What access to a mount without a server fails with: Linux and macOS, FreeBSD. */
const STALE_CODES: readonly string[] = ['ENOTCONN', 'ENXIO'];
