/** What brings the guest of a checkpoint back: its disks as they were, and the line that starts it from its memory. */
import type { Checkpoint } from '../disk/disk.ts';
import { FsError } from '../errors.ts';
import type { RestoreRequest } from '../guest/guest.ts';
import { shortName } from './by-id-directory.ts';
import type { MountedDisk } from './mounted-disk.ts';
import { MEMORY_FILE } from './state-folder.ts';

const PLAIN_WORD = /^[\w@%+=:,./-]+$/;

/** The longest path that every bhyve takes: to the memory file, with room for the endings of the others. */
const PATH_BYTES = 95;

/** As a shell reads it: in single quotes where it must be. */
export const shellWord = (word: string): string =>
  PLAIN_WORD.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;

/** The line to type first, then as comments of a shell what may keep the guest from coming back. */
export async function restoreCommandText(mounted: MountedDisk, checkpoint: Checkpoint): Promise<string> {
  const { machine } = mounted;
  const request = requestOf(holderOf(mounted, checkpoint));
  const { argv, warnings } = await machine.withGuest(async (running) => {
    if (running !== undefined) return running.restoreCommand(request);
    using guest = await machine.remembered(request.saved);
    return guest.restoreCommand(request);
  });
  return [argv.map(shellWord).join(' '), ...warnings.map((warning) => `# ${warning}`)].join('\n');
}

/**
 * Roll all disks of the guest back to their checkpoint of that name. Returns the path of the memory.
 * @throws FsError EBUSY while the guest runs; ENOENT where another disk has no such checkpoint, with nothing done
 */
export async function rollBackToRestore(mounted: MountedDisk, checkpoint: Checkpoint): Promise<string> {
  const { machine } = mounted;
  const { statePath, shortStatePath } = requestOf(holderOf(mounted, checkpoint));
  const { name, kind } = checkpoint;
  const what = `estoring ${JSON.stringify(name)}`;
  const all = machine.disks.map((disk) => ({ disk, its: disk === mounted ? checkpoint : disk.find(name, kind) }));
  await machine.refuseIfAlive(`R${what}`);
  for (const { disk } of all) await disk.refuseIfWritten(`r${what}`);
  for (const { disk, its } of all) await disk.rollback(its);
  return Buffer.byteLength(statePath) <= PATH_BYTES ? statePath : shortStatePath;
}

interface Holder {
  readonly mounted: MountedDisk;
  readonly checkpoint: Checkpoint;
}

const hasMemory = ({ stateFiles }: Checkpoint): boolean => stateFiles.some(({ name }) => name === MEMORY_FILE);

/**
 * Where the memory of that instant is: in this disk's checkpoint, or in that of another disk of the guest.
 * @throws FsError ENOTSUP where it is in none
 */
function holderOf(mounted: MountedDisk, checkpoint: Checkpoint): Holder {
  if (hasMemory(checkpoint)) return { mounted, checkpoint };
  for (const other of mounted.machine.disks) {
    const its = other.disk.checkpoints().find(({ name, kind }) => name === checkpoint.name && kind === checkpoint.kind);
    if (its !== undefined && hasMemory(its)) return { mounted: other, checkpoint: its };
  }
  throw new FsError(
    'ENOTSUP',
    `Checkpoint ${JSON.stringify(checkpoint.name)} holds no memory: roll back to it and start the guest as always.`,
  );
}

function requestOf({ mounted: { disk, machine }, checkpoint }: Holder): RestoreRequest {
  const { name, kind } = checkpoint;
  const directory = `${machine.mountpoint}/${disk.name}`;
  const folder = kind === 'internal' ? 'snapshots' : 'overlays';
  return {
    statePath: `${directory}/${folder}/${name}/${MEMORY_FILE}`,
    shortStatePath: `${directory}/.by-id/${shortName(checkpoint)}/${MEMORY_FILE}`,
    diskPath: `${directory}/disk.raw`,
    saved: disk.details(checkpoint).guest,
  };
}
