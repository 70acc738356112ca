/** Who keeps a mount busy, as far as /proc and /sys tell without asking the mount itself. Linux only. */

import { readdir, readFile, readlink } from 'node:fs/promises';
import { join } from 'node:path';
import { parseMountinfo } from './mount-list.ts';

const NAMED_MAX = 5;

/** Like `less (pid 812), /dev/loop0 (a loop device)`; empty if nothing was found. */
export async function usersOf(mountpoint: string): Promise<string> {
  if (process.platform !== 'linux') return '';
  const inside = (path: string): boolean => path === mountpoint || path.startsWith(`${mountpoint}/`);
  const found = [...(await mountsBelow(mountpoint)), ...(await loopDevices(inside)), ...(await processes(inside))];
  const named = found.slice(0, NAMED_MAX).join(', ');
  return found.length > NAMED_MAX ? `${named} and ${found.length - NAMED_MAX} more` : named;
}

async function mountsBelow(mountpoint: string): Promise<string[]> {
  const text = await readFile('/proc/self/mountinfo', 'utf8').catch(() => '');
  return parseMountinfo(text)
    .filter((mount) => mount.mountpoint.startsWith(`${mountpoint}/`))
    .map((mount) => `${mount.mountpoint} (mounted below)`);
}

async function loopDevices(inside: (path: string) => boolean): Promise<string[]> {
  const found: string[] = [];
  for (const name of await entries('/sys/block')) {
    if (!name.startsWith('loop')) continue;
    const backing = await readFile(`/sys/block/${name}/loop/backing_file`, 'utf8').catch(() => '');
    if (inside(backing.trimEnd())) found.push(`/dev/${name} (a loop device)`);
  }
  return found;
}

/** Processes with an open file, the working directory or the root inside. Those of other users are seen by root only. */
async function processes(inside: (path: string) => boolean): Promise<string[]> {
  const found: string[] = [];
  for (const pid of await entries('/proc')) {
    if (!/^\d+$/.test(pid)) continue;
    const links = ['cwd', 'root', ...(await entries(`/proc/${pid}/fd`)).map((fd) => join('fd', fd))];
    for (const link of links) {
      const path = await readlink(`/proc/${pid}/${link}`).catch(() => '');
      if (!inside(path)) continue;
      const name = await readFile(`/proc/${pid}/comm`, 'utf8').catch(() => '');
      found.push(`${name.trimEnd() || 'a process'} (pid ${pid})`);
      break;
    }
  }
  return found;
}

/** Empty where it cannot be read: the process is gone, or not ours to look at. */
const entries = (directory: string): Promise<string[]> => readdir(directory).catch(() => []);
