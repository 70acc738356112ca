/** bhyve's own command line, taken apart as getopt(3) does and put together again. */
import { FsError } from '../../errors.ts';

/** Options of bhyve(8) that take a value, over all releases. */
const WITH_VALUE = new Set('BGKUcfgklmoprs');

/** A command line without its `-r`, so that a new one can be put in. */
export function withRestore(argv: readonly string[], statePath: string): string[] {
  const [program = 'bhyve', ...words] = argv;
  return [program, '-r', statePath, ...withoutRestore(words)];
}

function withoutRestore(words: readonly string[]): string[] {
  const kept: string[] = [];
  for (const { letters, value, attached } of optionWords(words)) {
    if (letters === undefined) {
      kept.push(value as string);
      continue;
    }
    const restores = value !== undefined && letters.endsWith('r');
    const left = restores ? letters.slice(0, -1) : letters;
    if (restores) {
      if (left !== '') kept.push(`-${left}`);
    } else if (value === undefined) kept.push(`-${letters}`);
    else if (attached) kept.push(`-${letters}${value}`);
    else kept.push(`-${letters}`, value);
  }
  return kept;
}

/** `-s` values: slot and device model with its options. In the order of the command line. */
export function deviceArguments(argv: readonly string[]): string[] {
  return optionWords(argv.slice(1)).flatMap(({ letters, value }) =>
    letters?.endsWith('s') && value !== undefined ? [value] : [],
  );
}

/** Whether the firmware comes from a boot ROM: if not, bhyveload has to load the guest first. */
export const hasBootRom = (argv: readonly string[]): boolean =>
  optionWords(argv.slice(1)).some(
    ({ letters, value = '' }) =>
      (letters?.endsWith('l') && value.startsWith('bootrom')) ||
      (letters?.endsWith('o') && value.startsWith('bootrom=')),
  );

/** One word of options with the value of the last of its letters, or a word that is no option. */
interface OptionWord {
  /** Without the dash; undefined for an operand. */
  readonly letters: string | undefined;
  readonly value: string | undefined;
  /** The value is in the same word. */
  readonly attached: boolean;
}

function optionWords(words: readonly string[]): OptionWord[] {
  const found: OptionWord[] = [];
  for (let index = 0; index < words.length; index += 1) {
    const word = words[index] as string;
    if (!word.startsWith('-') || word === '-' || word === '--') {
      // The first operand ends the options.
      for (const value of words.slice(index)) found.push({ letters: undefined, value, attached: false });
      break;
    }
    const end = [...word].findIndex((letter, at) => at > 0 && WITH_VALUE.has(letter));
    if (end === -1) found.push({ letters: word.slice(1), value: undefined, attached: false });
    else if (end + 1 < word.length) {
      found.push({ letters: word.slice(1, end + 1), value: word.slice(end + 1), attached: true });
    } else {
      index += 1;
      found.push({ letters: word.slice(1), value: words[index], attached: false });
    }
  }
  return found;
}

/**
 * Words of a command line as sh(1) takes it apart, as far as quotes, backslashes and comments go.
 * @throws FsError EINVAL if a quote is left open
 */
export function shellWords(text: string): string[] {
  const words: string[] = [];
  // Comment; continued line; or pieces of one word: plain, escaped, in single quotes, in double quotes.
  const token = /(?<=^|\s)#[^\n]*|\\\n|((?:[^\s\\'"]|\\[^\n]|'[^']*'|"(?:[^"\\]|\\.)*")+)|\s+|./gsy;
  for (const [whole, word] of text.matchAll(token)) {
    if (word !== undefined) words.push(unquoted(word));
    else if (/^['"\\]$/.test(whole)) throw new FsError('EINVAL', `the command line leaves a ${whole} open`);
  }
  return words;
}

const unquoted = (word: string): string =>
  word.replace(/\\(.)|'([^']*)'|"((?:[^"\\]|\\.)*)"/gs, (_all, escaped, single, double) => {
    if (escaped !== undefined) return escaped;
    return single ?? double.replace(/\\(["\\$`])/g, '$1');
  });
