import type { Command } from 'commander';
import { example, IMAGE_OR_DISK } from './arguments.ts';
import { withTarget } from './target.ts';

export function addDelete(program: Command): void {
  program
    .command('delete')
    .description('delete a checkpoint; the contents of now stay as they are')
    .argument('<image-or-disk>', IMAGE_OR_DISK)
    .argument('<name>', 'name of the checkpoint')
    .addHelpText('after', example('vdskfs delete vm1.qcow2 before-upgrade'))
    .action((path: string, name: string) => withTarget(path, (target) => target.deleteCheckpoint(name)));
}
