import type { Command } from 'commander';
import { FsError } from '../errors.ts';
import { example, IMAGE_OR_DISK } from './arguments.ts';
import { withDisk } from './image-target.ts';
import { interruptible } from './interruptible.ts';
import { compactMounted } from './mounted-target.ts';
import { showProgress } from './progress.ts';
import { printable } from './table.ts';
import { mountedDisk } from './target.ts';

export function addCompact(program: Command): void {
  program
    .command('compact')
    .description('give unused space back: the end of the file moves into its free clusters, and is cut off')
    .argument('<image-or-disk>', IMAGE_OR_DISK)
    .addHelpText(
      'after',
      `\nContents and checkpoints stay as they are; a guest may go on meanwhile. Ctrl-C breaks it off between two steps, and\nwhat has been moved stays moved: the next run goes on from there.\n${example(
        'vdskfs compact vm1.qcow2',
        'vdskfs compact /mnt/vms/vm1',
      )}`,
    )
    .action(async (path: string) => {
      const directory = mountedDisk(path);
      if (directory !== undefined) return compactMounted(directory);
      await interruptible('the image is whole, compact it again for the rest', (signal) =>
        compactImageFile(path, signal),
      );
    });
}

function compactImageFile(path: string, signal: AbortSignal): Promise<void> {
  return withDisk(path, { readOnly: false }, async (disk) => {
    if (disk.readOnly !== undefined) throw new FsError('EROFS', `${path}: cannot be changed: ${disk.readOnly}`);
    using progress = showProgress(`compacting ${printable(path)}`);
    await disk.compact({ atRest: true, progress: progress.update, signal });
  });
}
