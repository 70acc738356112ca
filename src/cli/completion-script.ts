/** Completion scripts for shells, generated from the program's own commands and options, so they cannot go stale. */
import type { Argument, Command, Option } from 'commander';

export const shells = ['bash', 'zsh', 'fish'] as const;
export type Shell = (typeof shells)[number];

/** What a shell needs to know of one command. */
interface Completed {
  readonly name: string;
  readonly description: string;
  readonly options: readonly CompletedOption[];
  /** Words that its first argument may be; empty if it is a file. */
  readonly words: readonly string[];
}

interface CompletedOption {
  readonly flag: string;
  readonly description: string;
  readonly takesValue: boolean;
  readonly choices: readonly string[];
}

export function completionScript(shell: Shell, program: Command): string {
  const commands = program
    .createHelp()
    .visibleCommands(program)
    .filter((command) => command.name() !== 'help')
    .map(completed);
  switch (shell) {
    case 'bash':
      return bash(program.name(), commands);
    case 'zsh':
      return zsh(program.name(), commands);
    case 'fish':
      return fish(program.name(), commands);
  }
}

const completed = (command: Command): Completed => ({
  name: command.name(),
  description: command.description(),
  options: command.createHelp().visibleOptions(command).filter(hasLongFlag).map(completedOption),
  words: choicesOf(command.registeredArguments[0]),
});

const hasLongFlag = (option: Option): boolean => option.long != null;
const choicesOf = (argument: Argument | Option | undefined): readonly string[] => argument?.argChoices ?? [];

const completedOption = (option: Option): CompletedOption => ({
  flag: option.long ?? '',
  description: option.description,
  takesValue: option.required || option.optional,
  choices: choicesOf(option),
});

/** In single quotes for a POSIX shell, and for fish where the text has no backslash. */
const quoted = (text: string): string => `'${text.replaceAll("'", "'\\''")}'`;

function bash(name: string, commands: readonly Completed[]): string {
  const cases = commands.map(({ name: command, options, words }) => {
    const values = options
      .filter(({ choices }) => choices.length > 0)
      .map(
        ({ flag, choices }) =>
          `        ${flag}) COMPREPLY=($(compgen -W ${quoted(choices.join(' '))} -- "$current")); return ;;\n`,
      );
    const files = options
      .filter(({ takesValue, choices }) => takesValue && choices.length === 0)
      .map(({ flag }) => flag)
      .join('|');
    const filesCase = files === '' ? '' : `        ${files}) COMPREPLY=($(compgen -f -- "$current")); return ;;\n`;
    const others = words.length > 0 ? `-W ${quoted(words.join(' '))}` : '-f';
    return `    ${command})
      case $previous in
${values.join('')}${filesCase}      esac
      if [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W ${quoted(options.map(({ flag }) => flag).join(' '))} -- "$current"))
      else
        COMPREPLY=($(compgen ${others} -- "$current"))
      fi
      ;;
`;
  });
  return `# bash completion of ${name}
_${name}() {
  local current=\${COMP_WORDS[COMP_CWORD]} previous=\${COMP_WORDS[COMP_CWORD-1]}
  COMPREPLY=()
  if [[ $COMP_CWORD -eq 1 ]]; then
    COMPREPLY=($(compgen -W ${quoted([...commands.map(({ name: command }) => command), '--help', '--version'].join(' '))} -- "$current"))
    return
  fi
  case \${COMP_WORDS[1]} in
${cases.join('')}  esac
}
complete -o filenames -F _${name} ${name}
`;
}

function zsh(name: string, commands: readonly Completed[]): string {
  // _arguments takes [ ] : and \ as its own.
  const escaped = (text: string): string => text.replaceAll(/[\\:[\]]/g, '\\$&');
  const specification = ({ flag, description, takesValue, choices }: CompletedOption): string => {
    const value = !takesValue ? '' : choices.length > 0 ? `:value:(${choices.join(' ')})` : ':value:_files';
    return quoted(`${flag}[${escaped(description)}]${value}`);
  };
  const cases = commands.map(({ name: command, options, words }) => {
    const others = words.length > 0 ? `1:word:(${words.join(' ')})` : '*:file:_files';
    return `    ${command}) _arguments ${[...options.map(specification), quoted(others)].join(' ')} ;;\n`;
  });
  return `#compdef ${name}
_${name}() {
  local -a commands=(
${commands.map(({ name: command, description }) => `    ${quoted(`${command}:${escaped(description)}`)}\n`).join('')}  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  local command=$words[2]
  shift words
  (( CURRENT-- ))
  case $command in
${cases.join('')}  esac
}
if [[ $funcstack[1] == _${name} ]]; then _${name} "$@"; else compdef _${name} ${name}; fi
`;
}

function fish(name: string, commands: readonly Completed[]): string {
  // Inside single quotes fish knows \\ and \' as escapes.
  const text = (words: string): string => `'${words.replaceAll('\\', '\\\\').replaceAll("'", "\\'")}'`;
  const lines = commands.flatMap(({ name: command, description, options, words }) => {
    const within = `complete -c ${name} -n '__fish_seen_subcommand_from ${command}'`;
    return [
      `complete -c ${name} -n __fish_use_subcommand -f -a ${command} -d ${text(description)}`,
      ...(words.length > 0 ? [`${within} -f -a ${text(words.join(' '))}`] : []),
      ...options.map(({ flag, description: what, takesValue, choices }) => {
        const value = !takesValue ? '' : choices.length > 0 ? ` -x -a ${text(choices.join(' '))}` : ' -r';
        return `${within} -l ${flag.slice(2)} -d ${text(what)}${value}`;
      }),
    ];
  });
  return `# fish completion of ${name}\n${lines.join('\n')}\n`;
}
