/** Words of the command line that several commands share. */
import { realpathSync, statSync } from 'node:fs';
import { InvalidArgumentError } from 'commander';
import { parseSize } from './size.ts';

export const IMAGE = 'a qcow2 file that is not mounted';
export const IMAGE_OR_DISK = "a qcow2 file that is not mounted, or a disk's directory inside a mount";

/** For commander: a size in bytes. */
export function sizeArgument(text: string): number {
  const bytes = parseSize(text);
  if (bytes === undefined) throw new InvalidArgumentError('Give a size such as 10G, 512M, 1.5T or plain bytes.');
  return bytes;
}

/** For commander: a whole number of at least `least`. */
export const countArgument =
  (least: number) =>
  (text: string): number => {
    const count = Number(text);
    if (/^\d+$/.test(text) && Number.isSafeInteger(count) && count >= least) return count;
    throw new InvalidArgumentError(`Give a whole number of at least ${least}.`);
  };

/** For commander: one more folder, absolute and without links. */
export const foldersArgument = (path: string, before: readonly string[] = []): readonly string[] => [
  ...before,
  folderArgument(path),
];

/** For commander: an existing folder, absolute and without links. */
export function folderArgument(path: string): string {
  try {
    if (statSync(path).isDirectory()) return realpathSync(path);
  } catch {
    // said below
  }
  throw new InvalidArgumentError('Give a folder that exists.');
}

/** The last part of a command's help. */
export const example = (...lines: readonly string[]): string =>
  `\n${lines.length === 1 ? 'Example' : 'Examples'}:\n${lines.map((line) => `  $ ${line}\n`).join('')}`;
