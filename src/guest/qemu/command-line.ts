/** QEMU's arguments: from those that a guest ran with to those that bring it back. Pure. */
import { basename, dirname, join } from 'node:path';

/** With a value; all of them say how the guest begins, which the state does instead. */
const BEGINNINGS = ['incoming', 'loadvm'];
/** Without a value: the guest would wait for someone to start it. */
const WAIT = 'S';

export interface Restoring {
  readonly statePath: string;
  readonly diskPath: string;
  /** Of the program that will run; undefined if it did not tell. */
  readonly version: { readonly major: number; readonly minor: number } | undefined;
}

export interface RestoredArguments {
  readonly argv: readonly string[];
  readonly warnings: readonly string[];
}

/** @param argv what the guest ran with, the program first; empty if unknown */
export function restoringArguments(argv: readonly string[], restoring: Restoring): RestoredArguments {
  const { statePath, diskPath, version } = restoring;
  const incoming = ['-incoming', incomingFrom(statePath, version)];
  if (argv.length === 0) {
    const disk = `file=${escapeCommas(diskPath)},format=raw,if=virtio`;
    return {
      argv: ['qemu-system-x86_64', '-drive', disk, ...incoming],
      warnings: ['It is not known how the guest was started: add its machine, memory and devices, in the same order.'],
    };
  }

  const warnings: string[] = [];
  const kept = withoutBeginning(argv).map((argument) => withDisk(argument, diskPath));
  if (!kept.some((argument) => argument.includes(diskPath) || argument.includes(escapeCommas(diskPath)))) {
    warnings.push(`None of its arguments names the disk '${diskPath}': see that it is the one that the guest gets.`);
  }
  if (kept.some((argument) => /(^|,)(fd|fds|vhostfd|vhostfds)=\d|^--?add-fd$|\/dev\/fdset\//.test(argument))) {
    warnings.push('The guest was started with open descriptors, which whoever starts it has to open again.');
  }
  return { argv: [...kept, ...incoming], warnings };
}

/** file: is there since QEMU 8.2; before, a program has to read the file. */
function incomingFrom(path: string, version: Restoring['version']): string {
  const byName = version !== undefined && (version.major > 8 || (version.major === 8 && version.minor >= 2));
  // file: takes options behind a comma.
  if (byName && !path.includes(',')) return `file:${path}`;
  return `exec:cat < '${path.replaceAll("'", "'\\''")}'`;
}

function withoutBeginning(argv: readonly string[]): string[] {
  const kept: string[] = [];
  for (let at = 0; at < argv.length; at++) {
    const argument = argv[at] as string;
    const option = /^--?(\w+)$/.exec(argument)?.[1];
    if (option === WAIT) continue;
    if (option !== undefined && BEGINNINGS.includes(option)) at++;
    else kept.push(argument);
  }
  return kept;
}

const escapeCommas = (path: string): string => path.replaceAll(',', ',,');
const escapeExpression = (text: string): string => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');

/** The argument with `diskPath` wherever it names a file of that name in a folder of that name: the tree may have moved. */
function withDisk(argument: string, diskPath: string): string {
  const json = argument.startsWith('{');
  const written = json ? JSON.stringify(diskPath).slice(1, -1) : escapeCommas(diskPath);
  const tail = join(basename(dirname(diskPath)), basename(diskPath));
  const name = escapeExpression(json ? JSON.stringify(tail).slice(1, -1) : escapeCommas(tail));
  // A path begins behind = : or " and ends where the option does; a comma within it is doubled.
  const folder = json ? '(?:[^":][^"]*/)?' : '(?:(?:[^=:,]|,,)(?:[^=,]|,,)*/)?';
  const before = json ? '"(?:\\w+:)?' : '^|[=:,]';
  const after = json ? '"' : '$|,(?!,)';
  return argument.replace(new RegExp(`(${before})${folder}${name}(?=${after})`, 'g'), (_, start) => start + written);
}
