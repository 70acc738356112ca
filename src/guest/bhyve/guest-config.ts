/**
 * What `--guest-config FILE` says of a guest: its command line (`bhyve -c 2 … NAME`, as in a script of the user's), or
 * a file of bhyve_config(5) for `bhyve -k`.
 */
import { readFile } from 'node:fs/promises';
import { basename, resolve } from 'node:path';
import { fsErrorFrom } from '../../os/errno.ts';
import { shellWords } from './command-line.ts';

/** The command line of the guest `name`, the program first. @throws FsError if the file cannot be used */
export async function readGuestConfig(file: string, name: string): Promise<string[]> {
  const path = resolve(file);
  try {
    return parseGuestConfig(await readFile(path, 'utf8'), path, name);
  } catch (error) {
    throw fsErrorFrom(error, `cannot use --guest-config '${file}'`);
  }
}

/** What ends a command in sh(1), as a word of its own. */
const SEPARATORS = ['&', '&&', ';', '|', '||'];

export function parseGuestConfig(text: string, path: string, name: string): string[] {
  const configuration = ['bhyve', '-k', path, name];
  const lines = text.replace(/\\\n/g, ' ').split('\n');
  if (lines.some((line) => /^\s*[\w.]+=\S/.test(line) && !/\sbhyve\s/.test(line)) && !text.includes('bhyve ')) {
    return configuration;
  }
  for (const line of lines) {
    const words = shellWords(line);
    const program = words.findIndex((word) => basename(word) === 'bhyve');
    if (program === -1) continue;
    const end = words.findIndex((word, index) => index > program && SEPARATORS.includes(word));
    return words.slice(program, end === -1 ? undefined : end);
  }
  return configuration;
}
