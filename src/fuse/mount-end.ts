/** Learning that a mount is gone, for a driver that nobody tells: it has to look. */

import { lstat } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { mountAt } from './mount-list.ts';

const LOOK_EVERY_MS = 200;

/**
 * Start watching the mount on top at `mountpoint`, which must be there already. The promise resolves when it is gone:
 * on Linux when the kernel dropped the file system, so not before the last file of a lazy unmount is closed.
 */
export async function watchMount(mountpoint: string): Promise<{ readonly gone: Promise<void> }> {
  const mount = await mountAt(mountpoint);
  const listed = async (): Promise<boolean> => {
    const now = await mountAt(mountpoint);
    return now !== undefined && now.type === mount?.type && now.device === mount?.device;
  };
  // Device numbers are used again at once; the inode of the mount's entry in sysfs is not.
  const entry = mount?.device === undefined ? undefined : `/sys/class/bdi/${mount.device}`;
  const identity = entry === undefined ? undefined : await inodeOf(entry);
  const there =
    entry === undefined || identity === undefined ? listed : async () => (await inodeOf(entry)) === identity;
  return { gone: untilFalse(there) };
}

async function untilFalse(there: () => Promise<boolean>): Promise<void> {
  while (await there()) await sleep(LOOK_EVERY_MS, undefined, { ref: false });
}

const inodeOf = async (path: string): Promise<bigint | undefined> =>
  (await lstat(path, { bigint: true }).catch(() => undefined))?.ino;
