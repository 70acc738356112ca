/** The commands of `control` (INTERFACE.md section 3): one table, from which help is printed too. */
import { FsError } from '../errors.ts';
import type { Guest } from '../guest/guest.ts';
import { nameAndOptions, splitCommand, splitWords } from './command-line.ts';
import { done, type MountedDisk } from './mounted-disk.ts';
import { restoreCommandText, rollBackToRestore } from './restore-command.ts';

interface Command {
  readonly name: string;
  readonly usage: string;
  readonly help: string;
  /** `rest`: the line behind the command. Returns the answer, without a newline at its end. */
  readonly run: (mounted: MountedDisk, rest: string, signal: AbortSignal) => Promise<string>;
}

const NO_MEMORY = '--no-memory';
const SHRINK = '--shrink';
const DISCARD = '--discard';

const commands: readonly Command[] = [
  { name: 'help', usage: '', help: 'this list', run: async () => helpText() },
  { name: 'status', usage: '', help: 'guest, state, running operation and its progress', run: status },
  {
    name: 'checkpoint',
    usage: 'NAME [--no-memory]',
    help: 'take one, as mkdir snapshots/NAME does',
    run: async (mounted, rest, signal) => {
      const { name, options } = nameIn('checkpoint', rest, [NO_MEMORY]);
      const withoutMemory = options.has(NO_MEMORY);
      return done.taken(await mounted.take(name, { kind: 'internal', withoutMemory, signal }));
    },
  },
  {
    name: 'del-checkpoint',
    usage: 'NAME',
    help: 'delete it, as rmdir snapshots/NAME does',
    run: async (mounted, rest) => {
      const checkpoint = mounted.find(nameIn('del-checkpoint', rest).name, 'internal');
      await mounted.delete(checkpoint);
      return done.deleted(checkpoint);
    },
  },
  {
    name: 'ext-checkpoint',
    usage: 'NAME [--no-memory]',
    help: 'take an external one, as mkdir overlays/NAME does',
    run: async (mounted, rest, signal) => {
      const { name, options } = nameIn('ext-checkpoint', rest, [NO_MEMORY]);
      const withoutMemory = options.has(NO_MEMORY);
      return done.taken(await mounted.take(name, { kind: 'external', withoutMemory, signal }));
    },
  },
  {
    name: 'del-ext-checkpoint',
    usage: 'NAME [--discard]',
    help: 'merge it away, as rmdir overlays/NAME does, or throw away what was written since',
    run: async (mounted, rest, signal) => {
      const { name, options } = nameIn('del-ext-checkpoint', rest, [DISCARD]);
      const checkpoint = mounted.find(name, 'external');
      if (!options.has(DISCARD)) {
        await mounted.delete(checkpoint, { signal });
        return done.deleted(checkpoint);
      }
      await mounted.discard(checkpoint);
      return `${done.deleted(checkpoint)}; what was written since it was taken is discarded, the disk is as it was then`;
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
  {
    name: 'compact',
    usage: '',
    help: 'give unused space back, as vdskfs compact does; the guest may go on',
    run: async (mounted, _rest, signal) => {
      const { bytesBefore, bytesAfter } = await mounted.compact(signal);
      return `the file had ${bytesBefore} bytes and has ${bytesAfter}`;
    },
  },
  {
    name: 'diff',
    usage: 'FROM [TO]',
    help: 'what changed between two checkpoints, or from one until now, as JSON; names with spaces in double quotes',
    run: async (mounted, rest, signal) => {
      const [from, to, ...more] = splitWords(rest);
      if (from === undefined || more.length > 0) throw wrongUsage('diff');
      const later = to === undefined ? undefined : mounted.find(to);
      return JSON.stringify(await mounted.disk.differences(mounted.find(from), later, { signal }));
    },
  },
  {
    name: 'space',
    usage: '',
    help: 'the bytes that each checkpoint has to itself, shares, and frees when it is deleted, as JSON',
    run: async ({ disk }, _rest, signal) => {
      const { checkpoints, live } = await disk.space({ signal });
      const listed = checkpoints.map(({ checkpoint: { name, kind }, ...bytes }) => ({ name, kind, ...bytes }));
      return JSON.stringify({ checkpoints: listed, live });
    },
  },
  {
    name: 'suspend',
    usage: 'NAME',
    help: 'checkpoint with memory, then the guest ends',
    run: async (mounted, rest, signal) => {
      const { name } = nameIn('suspend', rest);
      const taken = await mounted.take(name, { kind: 'internal', suspend: true, signal });
      return `${done.taken(taken)}; the guest has ended`;
    },
  },
  {
    name: 'restore-command',
    usage: 'NAME',
    help: 'the command line that brings the guest back from there',
    run: async (mounted, rest) => restoreCommandText(mounted, mounted.find(nameIn('restore-command', rest).name)),
  },
  {
    name: 'restore',
    usage: 'NAME',
    help: 'roll all disks of the guest back to it; the answer is the file to start the guest from, as vdskfs restore does',
    run: async (mounted, rest) => rollBackToRestore(mounted, mounted.find(nameIn('restore', rest).name)),
  },
  guestCommand('pause', '', 'stop the vCPUs', (guest) => guest.pause()),
  guestCommand('resume', '', 'let them run', (guest) => guest.resume()),
  guestCommand('reset', '', 'reset the machine', (guest) => guest.reset()),
  guestCommand('poweroff', '', 'end it at once', (guest) => guest.poweroff()),
  guestCommand('nmi', '', 'send a non-maskable interrupt', (guest) => guest.nmi()),
  guestCommand('stats', '', 'its statistics', (guest) => guest.stats()),
  guestCommand('guest', 'WORDS…', 'forwarded to the guest as they are', (guest, words) => guest.forward(words)),
];

const byName = new Map(commands.map((command) => [command.name, command]));

/**
 * Run one line, a newline at its end or not. Its answer, or the sentence of its failure, becomes the disk's last one.
 * @throws FsError EINVAL for what is no command, and each command's own
 */
export function runCommand(mounted: MountedDisk, line: string, signal: AbortSignal): Promise<string> {
  return mounted.answer(async () => {
    const { command: word, rest } = splitCommand(line);
    const command = byName.get(word);
    if (command === undefined) {
      const known = commands.map(({ name }) => name).join(', ');
      throw new FsError('EINVAL', `There is no command ${JSON.stringify(word)}; there are ${known}.`);
    }
    if (command.usage === '' && rest !== '') throw wrongUsage(word);
    return command.run(mounted, rest, signal);
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

async function status(mounted: MountedDisk): Promise<string> {
  const { disk, openFiles, machine } = mounted;
  const { kind, name, alive, state } = await machine.status();
  const operation = mounted.operation();
  // Whoever writes disk.raw may be a guest that nobody told us of.
  const stranger = kind === 'none' && openFiles.writers().length > 0;
  return [
    `disk: ${disk.name}`,
    `image: ${disk.imagePath}`,
    `owner: ${disk.owner}`,
    `guest: ${name ?? 'none'}`,
    `kind: ${kind}`,
    `alive: ${alive ? 'yes' : 'no'}`,
    `state: ${stranger ? 'unknown' : state}`,
    `operation: ${operation === undefined ? 'idle' : `${operation.name} ${Math.floor(operation.progress * 100)}%`}`,
    ...(disk.readOnly === undefined ? [] : [`read-only: ${disk.readOnly}`]),
  ].join('\n');
}

function guestCommand(
  name: string,
  usage: string,
  help: string,
  act: (guest: Guest, rest: string) => Promise<string>,
): Command {
  const run = ({ disk, machine }: MountedDisk, rest: string): Promise<string> =>
    machine.withGuest(async (guest) => {
      if (usage !== '' && rest === '') throw wrongUsage(name);
      if (guest === undefined) {
        throw new FsError('ENOTSUP', `${name} is for guests: the disk ${disk.name} has no guest.`);
      }
      return (await act(guest, rest)) || `guest ${guest.name}: ${name} done`;
    });
  return { name, usage, help: `${help} (guest)`, run };
}

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
