/** How a line written to `control` is taken apart. Pure. */
import { FsError } from '../errors.ts';

export interface CommandLine {
  readonly command: string;
  /** All behind the command, without white space around it. */
  readonly rest: string;
}

const NOT_SPACE = /\S/;

export function splitCommand(line: string): CommandLine {
  const text = line.trim();
  const end = text.search(/\s/);
  return end < 0 ? { command: text, rest: '' } : { command: text.slice(0, end), rest: text.slice(end).trim() };
}

/**
 * A name that fills the rest of the line, spaces and all, or stands in double quotes; and the options before or after
 * it, each at most once.
 * @throws FsError EINVAL
 */
export function nameAndOptions(
  rest: string,
  known: readonly string[],
): { readonly name: string; readonly options: ReadonlySet<string> } {
  const options = new Set<string>();
  let text = rest;
  for (let again = true; again; ) {
    again = false;
    for (const option of known) {
      if (options.has(option)) continue;
      if (text.startsWith(`${option} `)) text = text.slice(option.length).trim();
      else if (text.endsWith(` ${option}`)) text = text.slice(0, -option.length).trim();
      else continue;
      options.add(option);
      again = true;
    }
  }
  if (!text.startsWith('"')) return { name: text, options };
  const words = splitWords(text);
  if (words.length !== 1) throw new FsError('EINVAL', `One name is wanted, not ${words.length}: ${text}`);
  return { name: words[0] as string, options };
}

/**
 * Words between white space; in double quotes a word may contain spaces, and `\"` and `\\` stand for `"` and `\`.
 * @throws FsError EINVAL for a quote that is not closed, or that a word goes on behind
 */
export function splitWords(text: string): string[] {
  const words: string[] = [];
  let at = 0;
  while (at < text.length) {
    if (!NOT_SPACE.test(text[at] as string)) {
      at++;
      continue;
    }
    const word = text[at] === '"' ? /"((?:[^"\\]|\\["\\])*)"(?=\s|$)/y : /\S+/y;
    word.lastIndex = at;
    const found = word.exec(text);
    if (found === null)
      throw new FsError('EINVAL', `A double quote is not closed, or not escaped by a backslash: ${text}`);
    words.push(found[1]?.replace(/\\(["\\])/g, '$1') ?? found[0]);
    at = word.lastIndex;
  }
  return words;
}
