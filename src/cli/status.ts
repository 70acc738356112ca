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
  readonly disks: readonly { readonly name: string; readonly image: string }[];
}

export function addStatus(program: Command): void {
  program
    .command('status')
    .description('show what is mounted, and by which process')
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
  if (state !== undefined && isServing(state)) return fromState(state, 'serving');
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
): MountStatus => ({ mountpoint, state, pid, driver, readOnly, started: new Date(startedMs).toISOString(), disks });

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
    const images = mount.disks.map(({ name, image }) => `${printable(name)} (${printable(image)})`);
    return [[...line, images[0] ?? '-'], ...images.slice(1).map((image) => ['', '', '', '', '', image])];
  });
  const stale = all.filter(({ state }) => state === 'stale').map(({ mountpoint }) => printable(mountpoint));
  const advice = stale.map((mountpoint) => `its process is dead: vdskfs unmount ${mountpoint}\n`).join('');
  return formatTable(columns, rows) + advice;
}

const columns = ['MOUNTPOINT', 'STATE', 'PROCESS', 'DRIVER', 'SINCE', 'DISKS'].map((head) => ({
  head,
  align: head === 'PROCESS' ? ('right' as const) : ('left' as const),
}));
