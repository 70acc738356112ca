import type { Command } from 'commander';
import { example, IMAGE_OR_DISK } from './arguments.ts';
import { exitStatus } from './failure.ts';
import { withWritable } from './image-target.ts';
import { interruptible } from './interruptible.ts';
import { mountedTarget } from './mounted-target.ts';
import { showProgress } from './progress.ts';
import { printable } from './table.ts';
import { mountedDisk, withTarget } from './target.ts';

interface DeleteFlags {
  readonly external?: boolean;
  readonly discard?: boolean;
}

export function addDelete(program: Command): void {
  program
    .command('delete')
    .description('delete a checkpoint; the contents of now stay as they are')
    .argument('<image-or-disk>', IMAGE_OR_DISK)
    .argument('<name>', 'name of the checkpoint')
    .option('--external', 'one in an overlay, which is merged into what it stands on')
    .option('--discard', 'with --external: instead throw away what was written since')
    .addHelpText(
      'after',
      example(
        'vdskfs delete vm1.qcow2 before-upgrade',
        'vdskfs delete --external /mnt/vms/vm1 nightly',
        'vdskfs delete --external --discard vm1.qcow2 nightly',
      ),
    )
    .action(
      async (path: string, name: string, { external = false, discard = false }: DeleteFlags, command: Command) => {
        if (discard && !external)
          command.error('vdskfs: --discard goes with --external', { exitCode: exitStatus.USAGE });
        if (!external) return withTarget(path, async (target) => void (await target.deleteCheckpoint(name)));
        const directory = mountedDisk(path);
        if (directory !== undefined) {
          const answer = await mountedTarget(directory).deleteCheckpoint(name, { external, discard });
          if (discard) process.stdout.write(`${answer}\n`);
          return;
        }
        await interruptible('nothing is lost, delete it again to go on', (signal) =>
          withWritable(path, async (target) => {
            using progress = showProgress(`merging ${printable(name)}`);
            const options = { external, discard, signal, progress: progress.update };
            const answer = await target.deleteCheckpoint(name, options);
            if (discard) process.stdout.write(`${answer}\n`);
          }),
        );
      },
    );
}
