import type { Command } from 'commander';
import { example, IMAGE_OR_DISK } from './arguments.ts';
import { withTarget } from './target.ts';

export function addRollback(program: Command): void {
  program
    .command('rollback')
    .description('make the contents those of a checkpoint again; what was written since is lost')
    .argument('<image-or-disk>', `${IMAGE_OR_DISK}; no guest may be running on it`)
    .argument('<name>', 'name of the checkpoint, which stays')
    .addHelpText('after', example('vdskfs rollback vm1.qcow2 before-upgrade'))
    .action((path: string, name: string) => withTarget(path, (target) => target.rollback(name)));
}
