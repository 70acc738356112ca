/** What a directory must be like before anything is mounted on it. */
import { readdir, stat } from 'node:fs/promises';
import { FsError } from '../errors.ts';
import { canonical, findStaleMount, listMounts, mountAt } from '../fuse/mount-list.ts';
import { fsErrorFrom } from '../os/errno.ts';
import { endMount } from './unmounting.ts';

/**
 * Check a mountpoint. `replace`: end first what vdskfs has mounted there, whether its process lives or is dead.
 * @returns its path as the list of mounts will have it
 * @throws FsError with what is in the way and what to do
 */
export async function prepareMountpoint(path: string, { replace }: { readonly replace: boolean }): Promise<string> {
  const mountpoint = await canonical(path);
  await clearWay(mountpoint, replace);
  const outer = (await listMounts()).find((mount) => mountpoint.startsWith(`${mount.mountpoint}/`));
  if (outer !== undefined) {
    throw new FsError(
      'EINVAL',
      `${mountpoint}: lies inside the vdskfs mount at ${outer.mountpoint}; choose a directory outside of it`,
    );
  }
  let names: string[];
  try {
    if (!(await stat(mountpoint)).isDirectory()) {
      throw new FsError('ENOTDIR', `${mountpoint}: the last argument must be an empty directory to mount on`);
    }
    names = await readdir(mountpoint);
  } catch (error) {
    throw fsErrorFrom(error, `cannot mount on ${mountpoint}`);
  }
  if (names.length > 0) {
    throw new FsError(
      'ENOTEMPTY',
      `${mountpoint}: not empty (${names[0]} is in it), and mounting would hide that; choose an empty directory`,
    );
  }
  return mountpoint;
}

async function clearWay(mountpoint: string, replace: boolean): Promise<void> {
  const stale = (await findStaleMount(mountpoint)) !== undefined;
  const ours = (await listMounts()).some((mount) => mount.mountpoint === mountpoint);
  if ((stale || ours) && replace) return endMount(mountpoint);
  if (stale) {
    throw new FsError(
      'EBUSY',
      `${mountpoint}: the mount of a process that died is still there; run \`vdskfs unmount ${mountpoint}\` or add --replace`,
    );
  }
  if (ours) {
    throw new FsError(
      'EBUSY',
      `${mountpoint}: vdskfs has a mount there already; run \`vdskfs unmount ${mountpoint}\` or add --replace`,
    );
  }
  const other = await mountAt(mountpoint);
  if (other !== undefined) {
    throw new FsError('EBUSY', `${mountpoint}: a mount point of type ${other.type} already; choose another directory`);
  }
}
