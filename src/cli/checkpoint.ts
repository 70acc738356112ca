import type { Command } from 'commander';
import { example, IMAGE_OR_DISK } from './arguments.ts';
import { withTarget } from './target.ts';

export function addCheckpoint(program: Command): void {
  program
    .command('checkpoint')
    .description('take a checkpoint: keep the contents of this moment under a name')
    .argument('<image-or-disk>', IMAGE_OR_DISK)
    .argument('<name>', 'name of the new checkpoint')
    .option('--external', 'in an overlay: a qcow2 file of its own, over which the disk goes on')
    .option('--no-memory', 'of a running guest: only its disks, not its memory')
    .addHelpText(
      'after',
      example('vdskfs checkpoint vm1.qcow2 before-upgrade', 'vdskfs checkpoint /mnt/vms/vm1 nightly'),
    )
    .action((path: string, name: string, { memory, external = false }: { memory: boolean; external?: boolean }) =>
      withTarget(path, (target) => target.takeCheckpoint(name, { withoutMemory: !memory, external })),
    );
}
