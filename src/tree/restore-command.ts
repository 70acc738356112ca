/** `restore-command`: the line that starts the guest of a checkpoint from its memory. */
import type { Checkpoint } from '../disk/disk.ts';
import { FsError } from '../errors.ts';
import type { RestoreCommand } from '../guest/guest.ts';
import { shortName } from './by-id-directory.ts';
import type { MountedDisk } from './mounted-disk.ts';
import { MEMORY_FILE } from './state-folder.ts';

const PLAIN_WORD = /^[\w@%+=:,./-]+$/;

/** As a shell reads it: in single quotes where it must be. */
export const shellWord = (word: string): string =>
  PLAIN_WORD.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;

/** The line to type first, then as comments of a shell what may keep the guest from coming back. */
export async function restoreCommandText(mounted: MountedDisk, checkpoint: Checkpoint): Promise<string> {
  const { argv, warnings } = await restoreCommand(mounted, checkpoint);
  return [argv.map(shellWord).join(' '), ...warnings.map((warning) => `# ${warning}`)].join('\n');
}

/** @throws FsError ENOTSUP where the checkpoint has no memory */
async function restoreCommand({ disk, machine }: MountedDisk, checkpoint: Checkpoint): Promise<RestoreCommand> {
  const { name, kind, stateFiles } = checkpoint;
  if (!stateFiles.some((file) => file.name === MEMORY_FILE)) {
    throw new FsError(
      'ENOTSUP',
      `Checkpoint ${JSON.stringify(name)} holds no memory: roll back to it and start the guest as always.`,
    );
  }
  const saved = disk.details(checkpoint).guest;
  const directory = `${machine.mountpoint}/${disk.name}`;
  const folder = kind === 'internal' ? 'snapshots' : 'overlays';
  const request = {
    statePath: `${directory}/${folder}/${name}/${MEMORY_FILE}`,
    shortStatePath: `${directory}/.by-id/${shortName(checkpoint)}/${MEMORY_FILE}`,
    diskPath: `${directory}/disk.raw`,
    saved,
  };
  return machine.withGuest(async (running) => {
    if (running !== undefined) return running.restoreCommand(request);
    using guest = await machine.remembered(saved);
    return guest.restoreCommand(request);
  });
}
