import type { Command } from 'commander';
import { example, IMAGE_OR_DISK } from './arguments.ts';
import { withTarget } from './target.ts';

export function addRename(program: Command): void {
  program
    .command('rename')
    .description('give a checkpoint another name')
    .argument('<image-or-disk>', IMAGE_OR_DISK)
    .argument('<old>', 'its name')
    .argument('<new>', 'its new name')
    .addHelpText('after', example('vdskfs rename vm1.qcow2 nightly 2026-03-01'))
    .action((path: string, oldName: string, newName: string) =>
      withTarget(path, (target) => target.renameCheckpoint(oldName, newName)),
    );
}
