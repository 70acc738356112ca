/** The clean end of a mount, seen from outside its serving process. */
import { setTimeout as sleep } from 'node:timers/promises';
import { FsError } from '../errors.ts';
import { canonical, findStaleMount, listMounts, mountAt } from '../fuse/mount-list.ts';
import { clearStaleMount, mountingWay, unmountDevice } from '../fuse/mounting.ts';
import { isServing, readState, removeState, type ServerState } from './state.ts';

const POLL_MS = 20;
const MOMENT_MS = 1000;

/**
 * End the mount at `path` and wait for its process to be gone: all is written out then, and the locks are released.
 * A mount whose process is dead is just taken away.
 * @param waiting called once, with what is waited for, when the end takes longer than a moment
 * @throws FsError EBUSY while something in it is in use, naming that; ENOENT if nothing is mounted there
 */
export async function endMount(path: string, waiting: (what: string) => void = () => {}): Promise<void> {
  const mountpoint = await canonical(path);
  const state = readState(mountpoint);
  const stale = await findStaleMount(mountpoint);
  if (stale !== undefined) await clearStaleMount(stale);
  else if (await isMounted(mountpoint)) await unmountDevice(mountingWay(), mountpoint);
  else if (state === undefined) throw await notMounted(mountpoint);

  // Also one that was detached lazily before: it serves what is still open, and its images are locked until it ends.
  if (state !== undefined) await processEnd(state, waiting);
  const failure = readState(mountpoint)?.failure;
  removeState(mountpoint);
  if (failure !== undefined) throw new FsError('EIO', `${mountpoint}: unmounted, but ${failure}`);
}

const isMounted = async (mountpoint: string): Promise<boolean> =>
  (await listMounts()).some((mount) => mount.mountpoint === mountpoint);

async function notMounted(mountpoint: string): Promise<FsError> {
  const other = await mountAt(mountpoint);
  return other === undefined
    ? new FsError('ENOENT', `${mountpoint}: nothing is mounted there; \`vdskfs status\` lists what is`)
    : new FsError('EINVAL', `${mountpoint}: a mount of type ${other.type}, not of vdskfs; use umount(8)`);
}

async function processEnd(state: ServerState, waiting: (what: string) => void): Promise<void> {
  const noticeAt = Date.now() + MOMENT_MS;
  let noticed = false;
  while (isServing(state)) {
    if (!noticed && Date.now() >= noticeAt) {
      noticed = true;
      waiting(`process ${state.pid} writes everything out and releases ${state.mountpoint}`);
    }
    await sleep(POLL_MS);
  }
}
