/** bhyvectl(8), which always speaks the dialect of its own system's bhyve. */
import { FsError } from '../../errors.ts';
import { codeOf, fsErrorFrom } from '../../os/errno.ts';
import { type CommandResult, runCommand } from '../../os/run-command.ts';

export interface BhyvectlTarget {
  readonly name: string;
  /** Where its control sockets are, if not in the usual place. */
  readonly runDirectory: string | undefined;
}

/** Complaints are cut: an unknown option is answered with two pages of options. */
const COMPLAINT_LENGTH_MAX = 300;

/** `--vm=NAME WORDS…`, the form of the manual page. */
export const controlArguments = (target: BhyvectlTarget, words: readonly string[]): string[] => [
  `--vm=${target.name}`,
  ...runDirectoryArguments(target),
  ...words,
];

/** `--checkpoint NAME --vm=VM`, the form of the libvdsk project. */
export const attachedArguments = (target: BhyvectlTarget, option: string, name: string): string[] => [
  option,
  name,
  `--vm=${target.name}`,
  ...runDirectoryArguments(target),
];

const runDirectoryArguments = ({ runDirectory }: BhyvectlTarget): string[] =>
  runDirectory === undefined ? [] : [`--rundir=${runDirectory}`];

/** Run bhyvectl to its end; undefined if it is not installed. */
export async function tryBhyvectl(args: readonly string[]): Promise<CommandResult | undefined> {
  try {
    return await runCommand({ program: 'bhyvectl', args });
  } catch (error) {
    if (codeOf(error) === 'ENOENT') return undefined;
    throw fsErrorFrom(error, 'cannot run bhyvectl');
  }
}

/**
 * Run bhyvectl, which must succeed. Resolves with what it printed.
 * @throws FsError ENOTSUP if it is not installed or does not know the option; ENOTCONN if there is no such VM; EIO
 */
export async function bhyvectl(target: BhyvectlTarget, args: readonly string[]): Promise<string> {
  const result = await tryBhyvectl(args);
  if (result === undefined) {
    throw new FsError('ENOTSUP', `bhyvectl is not installed: '${target.name}' can only be controlled through it`);
  }
  if (result.status !== 0) throw bhyvectlFailure(target, args, result);
  return result.stdout.trimEnd();
}

export function bhyvectlFailure(target: BhyvectlTarget, args: readonly string[], result: CommandResult): FsError {
  const command = `bhyvectl ${args.join(' ')}`;
  const said = result.complaint || result.stdout.trim().replace(/\s*\n\s*/g, '; ');
  if (/(unrecogni[sz]ed|unknown|invalid|illegal) option|^usage/i.test(said)) {
    return new FsError('ENOTSUP', `this host's bhyvectl does not know how to: ${command}`);
  }
  const reason = said === '' ? `exit status ${result.status}` : said.slice(0, COMPLAINT_LENGTH_MAX);
  if (/could not be opened|VM:\S* is not created/.test(said)) {
    return new FsError('ENOTCONN', `the guest '${target.name}' does not run: ${command}: ${reason}`);
  }
  return new FsError('EIO', `${command} failed: ${reason}`);
}
