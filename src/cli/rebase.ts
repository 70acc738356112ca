import type { Command } from 'commander';
import { rebaseImage } from '../disk/rebase.ts';
import { example, IMAGE } from './arguments.ts';
import { withMountOf } from './image-target.ts';
import { interruptible } from './interruptible.ts';
import { showProgress } from './progress.ts';
import { printable } from './table.ts';
import { refuseMounted } from './target.ts';

export function addRebase(program: Command): void {
  program
    .command('rebase')
    .description('put an image on another backing file, or on none; its contents stay as they are')
    .argument('<image>', IMAGE)
    .requiredOption('--backing <file>', "the new backing file, relative to the image's folder; '' for none")
    .addHelpText(
      'after',
      `
What the new backing file would change is copied into the image first; the header names the new one when all of it is
there. Refused where internal checkpoints of the image show what is in the backing file. Ctrl-C breaks it off: the image
then stands on the old one, with the same contents, and the same command goes on.\n${example(
        'vdskfs rebase overlay.qcow2 --backing base-2026.qcow2',
        "vdskfs rebase clone.qcow2 --backing ''",
      )}`,
    )
    .action(async (path: string, { backing }: { backing: string }) => {
      refuseMounted(path);
      const consequence = `${printable(path)} stands on its old backing file, with the same contents`;
      await interruptible(consequence, async (signal) => {
        using progress = showProgress(`rebasing ${printable(path)}`);
        try {
          await rebaseImage(path, backing === '' ? undefined : backing, { progress: progress.update, signal });
        } catch (error) {
          throw withMountOf(path, error);
        }
      });
    });
}
