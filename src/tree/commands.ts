/** The commands of `control` (INTERFACE.md section 3): one table, from which help is printed too. */
import { FsError } from '../errors.ts';
import { nameAndOptions, splitCommand, splitWords } from './command-line.ts';
import { done, type MountedDisk } from './mounted-disk.ts';

interface Command {
  readonly name: string;
  readonly usage: string;
  readonly help: string;
  /** `rest`: the line behind the command. Returns the answer, without a newline at its end. */
  readonly run: (mounted: MountedDisk, rest: string) => Promise<string>;
}

const NO_MEMORY = '--no-memory';
const SHRINK = '--shrink';

const commands: readonly Command[] = [
  { name: 'help', usage: '', help: 'this list', run: async () => helpText() },
  { name: 'status', usage: '', help: 'guest, state, running operation and its progress', run: status },
  {
    name: 'checkpoint',
    usage: 'NAME [--no-memory]',
    help: 'take one, as mkdir snapshots/NAME does',
    run: async (mounted, rest) => {
      const { name } = nameIn('checkpoint', rest, [NO_MEMORY]);
      return done.taken(await mounted.take(name));
    },
  },
  {
    name: 'del-checkpoint',
    usage: 'NAME',
    help: 'delete it, as rmdir snapshots/NAME does',
    run: async (mounted, rest) => {
      const checkpoint = mounted.find(nameIn('del-checkpoint', rest).name);
      await mounted.delete(checkpoint);
      return done.deleted(checkpoint);
    },
  },
  {
    name: 'ext-checkpoint',
    usage: 'NAME',
    help: 'take an external one, as mkdir overlays/NAME does (not yet)',
    run: async () => {
      throw overlaysMissing();
    },
  },
  {
    name: 'del-ext-checkpoint',
    usage: 'NAME [--discard]',
    help: 'delete an external one, as rmdir overlays/NAME does (not yet)',
    run: async () => {
      throw overlaysMissing();
    },
  },
  {
    name: 'rename',
    usage: 'OLD NEW',
    help: 'rename a checkpoint; names with spaces in double quotes',
    run: async (mounted, rest) => {
      const [old, renamed, ...more] = splitWords(rest);
      if (old === undefined || renamed === undefined || more.length > 0) throw wrongUsage('rename');
      return done.renamed(old, await mounted.rename(mounted.find(old), renamed));
    },
  },
  {
    name: 'rollback',
    usage: 'NAME',
    help: 'live contents := checkpoint; nothing may have the disk open for writing',
    run: async (mounted, rest) => {
      const checkpoint = mounted.find(nameIn('rollback', rest).name);
      await mounted.rollback(checkpoint);
      return `the disk is as it was at checkpoint ${JSON.stringify(checkpoint.name)}`;
    },
  },
  {
    name: 'resize',
    usage: 'BYTES [--shrink]',
    help: 'set the size of the disk, as vdskfs resize does',
    run: async (mounted, rest) => {
      const { name: size, options } = nameIn('resize', rest, [SHRINK]);
      const bytes = Number(size);
      if (!/^\d+$/.test(size) || !Number.isSafeInteger(bytes)) throw wrongUsage('resize');
      await mounted.resize(bytes, { shrink: options.has(SHRINK) });
      return `the disk has ${mounted.disk.virtualSize()} bytes`;
    },
  },
  guestCommand('suspend', 'NAME', 'checkpoint with memory, then power off'),
  guestCommand('restore-command', 'NAME', 'the command line that brings the guest back'),
  guestCommand('pause', '', 'stop the vCPUs'),
  guestCommand('resume', '', 'let them run'),
  guestCommand('reset', '', 'reset the machine'),
  guestCommand('poweroff', '', 'end it at once'),
  guestCommand('nmi', '', 'send a non-maskable interrupt'),
  guestCommand('stats', '', 'its statistics'),
  guestCommand('guest', 'WORDS…', 'forwarded as they are'),
];

const byName = new Map(commands.map((command) => [command.name, command]));

/**
 * Run one line, a newline at its end or not. Its answer, or the sentence of its failure, becomes the disk's last one.
 * @throws FsError EINVAL for what is no command, and each command's own
 */
export function runCommand(mounted: MountedDisk, line: string): Promise<string> {
  return mounted.answer(async () => {
    const { command: word, rest } = splitCommand(line);
    const command = byName.get(word);
    if (command === undefined) {
      const known = commands.map(({ name }) => name).join(', ');
      throw new FsError('EINVAL', `There is no command ${JSON.stringify(word)}; there are ${known}.`);
    }
    if (command.usage === '' && rest !== '') throw wrongUsage(word);
    return command.run(mounted, rest);
  });
}

function helpText(): string {
  const rows = commands.map(({ name, usage, help }) => [`${name} ${usage}`.trimEnd(), help] as const);
  const width = Math.max(...rows.map(([form]) => form.length));
  return [
    ...rows.map(([form, help]) => `${form.padEnd(width)}  ${help}`),
    '',
    'One command per write. A single NAME may contain spaces; in double quotes, \\" and \\\\ stand for " and \\.',
  ].join('\n');
}

async function status({ disk, openFiles }: MountedDisk): Promise<string> {
  const operation = disk.operation();
  const inUse = openFiles.writers().length > 0;
  return [
    `disk: ${disk.name}`,
    `image: ${disk.imagePath}`,
    'owner: served',
    'guest: none',
    'kind: none',
    'alive: no',
    // Whoever writes disk.raw may be a guest that nobody told us of.
    `state: ${inUse ? 'unknown' : 'off'}`,
    `operation: ${operation === undefined ? 'idle' : `${operation.name} ${Math.floor(operation.progress * 100)}%`}`,
    ...(disk.readOnly === undefined ? [] : [`read-only: ${disk.readOnly}`]),
  ].join('\n');
}

function guestCommand(name: string, usage: string, help: string): Command {
  const run = async ({ disk }: MountedDisk): Promise<string> => {
    throw new FsError('ENOTSUP', `${name} is for guests: the disk ${disk.name} has no guest.`);
  };
  return { name, usage, help: `${help} (guest)`, run };
}

/** ENOTSUP of everything that would make or delete an external checkpoint. */
export const overlaysMissing = (): FsError =>
  new FsError('ENOTSUP', 'External checkpoints (overlays) are not supported yet: take an internal one in snapshots/.');

function wrongUsage(name: string): FsError {
  const usage = byName.get(name)?.usage ?? '';
  return new FsError(
    'EINVAL',
    `Wrong usage: write ${`${name} ${usage}`.trimEnd()}${usage ? '' : ', nothing behind it'}.`,
  );
}

function nameIn(command: string, rest: string, options: readonly string[] = []) {
  if (rest === '') throw wrongUsage(command);
  return nameAndOptions(rest, options);
}
