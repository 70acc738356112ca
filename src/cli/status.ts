import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Command } from 'commander';
import { FsError } from '../errors.ts';
import { canonical, findStaleMount, listMounts, type MountEntry } from '../fuse/mount-list.ts';
import { example } from './arguments.ts';
import { isServing, readState, readStates, removeState, type ServerState } from './state.ts';
import { formatTable, printable } from './table.ts';
import { formatMoment } from './time.ts';

/** One line of `status`, and one element of its JSON. */
interface MountStatus {
  readonly mountpoint: string;
  /** `stale`: its process is dead. `detached`: out of the tree, still serving files that were open. */
  readonly state: 'serving' | 'stale' | 'detached';
  /** What another user's mount does not tell is null. */
  readonly pid: number | null;
  readonly driver: string | null;
  readonly readOnly: boolean;
  readonly started: string | null;
  readonly disks: readonly DiskStatus[];
}

interface DiskStatus {
  readonly name: string;
  readonly image: string;
  /** As in info.json; null where the mount does not tell. */
  readonly guest: GuestStatus | null;
}

interface GuestStatus {
  readonly kind: 'bhyve' | 'qemu' | 'none';
  readonly name: string | null;
  readonly alive: boolean;
}

/** A server that does not answer by then is not waited for. */
const ANSWER_MS = 3000;

export function addStatus(program: Command): void {
  program
    .command('status')
    .description('show what is mounted, by which process, and which guests are alive')
    .argument('[mountpoint]', 'only this one')
    .option('--json', 'for scripts')
    .addHelpText('after', example('vdskfs status', 'vdskfs status /mnt/vms --json'))
    .action(async (mountpoint: string | undefined, { json = false }: { json?: boolean }) => {
      const all = await mountStatuses();
      const shown = mountpoint === undefined ? all : [oneOf(all, await canonical(mountpoint))];
      process.stdout.write(json ? `${JSON.stringify(shown, null, 2)}\n` : describe(shown));
    });
}

function oneOf(all: readonly MountStatus[], mountpoint: string): MountStatus {
  const found = all.find((one) => one.mountpoint === mountpoint);
  if (found !== undefined) return found;
  throw new FsError('ENOENT', `${mountpoint}: nothing of vdskfs is mounted there; \`vdskfs status\` lists what is`);
}

/** What the list of mounts and the state files say together. A state that stands for nothing any more is removed. */
async function mountStatuses(): Promise<MountStatus[]> {
  const mounts = await listMounts();
  const mounted = new Set(mounts.map(({ mountpoint }) => mountpoint));
  const found: MountStatus[] = [];
  for (const mount of mounts) found.push(await statusOf(mount, readState(mount.mountpoint)));
  for (const state of readStates()) {
    if (mounted.has(state.mountpoint)) continue;
    if (isServing(state)) found.push(fromState(state, 'detached'));
    else removeState(state.mountpoint);
  }
  return found;
}

async function statusOf(mount: MountEntry, state: ServerState | undefined): Promise<MountStatus> {
  if (state !== undefined && isServing(state)) return withGuests(fromState(state, 'serving'));
  const stale = (await findStaleMount(mount.mountpoint)) !== undefined;
  if (state !== undefined && stale) return fromState(state, 'stale');
  return {
    mountpoint: mount.mountpoint,
    state: stale ? 'stale' : 'serving',
    pid: null,
    driver: null,
    readOnly: mount.readOnly,
    started: null,
    disks: [],
  };
}

const fromState = (
  { mountpoint, pid, driver, readOnly, startedMs, disks }: ServerState,
  state: MountStatus['state'],
): MountStatus => ({
  mountpoint,
  state,
  pid,
  driver,
  readOnly,
  started: new Date(startedMs).toISOString(),
  disks: disks.map(({ name, image }) => ({ name, image, guest: null })),
});

/** Completed by what the mounted disks say of their guests. */
async function withGuests(mount: MountStatus): Promise<MountStatus> {
  const disks = mount.disks.map(async (disk) => ({ ...disk, guest: await guestOf(mount.mountpoint, disk.name) }));
  return { ...mount, disks: await Promise.all(disks) };
}

async function guestOf(mountpoint: string, disk: string): Promise<GuestStatus | null> {
  try {
    const signal = AbortSignal.timeout(ANSWER_MS);
    const text = await readFile(join(mountpoint, disk, 'info.json'), { encoding: 'utf8', signal });
    return (JSON.parse(text) as { guest?: GuestStatus }).guest ?? null;
  } catch {
    return null; // it is just being unmounted, or does not answer
  }
}

function describe(all: readonly MountStatus[]): string {
  if (all.length === 0) return 'nothing is mounted\n';
  const rows = all.flatMap((mount) => {
    const line = [
      printable(mount.mountpoint),
      mount.state + (mount.readOnly ? ', read-only' : ''),
      mount.pid === null ? '-' : String(mount.pid),
      mount.driver ?? '-',
      mount.started === null ? '-' : formatMoment(Date.parse(mount.started)),
    ];
    const [first = ['-', '-'], ...others] = mount.disks.map(({ name, image, guest }) => [
      `${printable(name)} (${printable(image)})`,
      guestText(guest),
    ]);
    return [[...line, ...first], ...others.map((disk) => ['', '', '', '', '', ...disk])];
  });
  const stale = all.filter(({ state }) => state === 'stale').map(({ mountpoint }) => printable(mountpoint));
  const advice = stale.map((mountpoint) => `its process is dead: vdskfs unmount ${mountpoint}\n`).join('');
  return formatTable(columns, rows) + advice;
}

function guestText(guest: GuestStatus | null): string {
  if (guest === null || guest.kind === 'none') return '-';
  return `${printable(guest.name ?? '?')} (${guest.kind}, ${guest.alive ? 'alive' : 'off'})`;
}

const columns = ['MOUNTPOINT', 'STATE', 'PROCESS', 'DRIVER', 'SINCE', 'DISKS', 'GUEST'].map((head) => ({
  head,
  align: head === 'PROCESS' ? ('right' as const) : ('left' as const),
}));
