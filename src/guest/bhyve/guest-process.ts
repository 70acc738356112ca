/** The process that runs a bhyve guest. It calls itself "bhyve: NAME", which on FreeBSD hides its arguments. */
import { basename } from 'node:path';
import type { Process } from '../../os/process-list.ts';

export interface GuestProcess {
  readonly pid: number;
  /** What bhyve was started with, the program first; empty where its title hides it. */
  readonly argv: readonly string[];
}

/** Among `list`, the guest called `name`. */
export function findGuestProcess(list: readonly Process[], name: string): GuestProcess | undefined {
  const titled = list.find(({ argv }) => argv[0] === `bhyve: ${name}`);
  if (titled !== undefined) {
    return { pid: titled.pid, argv: titled.argv.length === 1 ? [] : ['bhyve', ...titled.argv.slice(1)] };
  }
  for (const { pid, argv } of list) {
    const program = argv.findIndex(isBhyve);
    if (program !== -1 && argv.length > program + 1 && argv.at(-1) === name) {
      return { pid, argv: argv.slice(program) };
    }
  }
  return undefined;
}

/** The program itself, or a script of that name behind its interpreter. */
const isBhyve = (word: string, index: number): boolean =>
  basename(word) === 'bhyve' && (index === 0 || (index === 1 && word.includes('/')));
