import { Argument, type Command } from 'commander';
import { example } from './arguments.ts';
import { completionScript, shells } from './completion-script.ts';

export function addCompletion(program: Command): void {
  program
    .command('completion')
    .description('print a script that teaches a shell to complete commands and options')
    .addArgument(new Argument('<shell>', 'the shell to print it for').choices(shells))
    .addHelpText(
      'after',
      example(
        'source <(vdskfs completion bash)',
        "vdskfs completion zsh > '/usr/local/share/zsh/site-functions/_vdskfs'",
        'vdskfs completion fish > ~/.config/fish/completions/vdskfs.fish',
      ),
    )
    .action((shell: (typeof shells)[number]) => {
      process.stdout.write(completionScript(shell, program));
    });
}
