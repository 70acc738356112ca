import type { Command } from 'commander';
import { mergeOverlay } from '../disk/merge.ts';
import { example, IMAGE } from './arguments.ts';
import { withMountOf } from './image-target.ts';
import { interruptible } from './interruptible.ts';
import { showProgress } from './progress.ts';
import { printable } from './table.ts';
import { refuseMounted } from './target.ts';

interface MergeFlags {
  readonly into?: string;
  readonly backingRoot: readonly string[];
}

export function addMerge(program: Command): void {
  program
    .command('merge')
    .description('commit an overlay down its chain: its backing file gets what was written since')
    .argument('<image>', `${IMAGE}: the overlay`)
    .option('--into <base>', 'a file further down the chain that is to get the contents; the files between go away')
    .option('--backing-root <dir>', 'look here, too, for images that stand on a file that would change', collect, [])
    .addHelpText(
      'after',
      `
The overlay stays, empties itself and shows what it showed, over the file that has the contents now. With --into the
files between are removed, since what they show would be wrong. Refused where another image stands on a file that would
change, where a file that would go away holds checkpoints, and where the overlay has internal checkpoints, which would
change. An overlay that is an external checkpoint of a disk goes away itself, as with vdskfs delete --external. Ctrl-C
breaks it off: the overlay then shows what it did, and the same command goes on.\n${example(
        'vdskfs merge overlay.qcow2',
        'vdskfs merge --into base.qcow2 overlay.qcow2',
      )}`,
    )
    .action(async (path: string, { into, backingRoot }: MergeFlags) => {
      refuseMounted(path);
      const consequence = `${printable(path)} shows what it did; the same command goes on with the merge`;
      const { base, removed } = await interruptible(consequence, async (signal) => {
        using progress = showProgress(`merging ${printable(path)}`);
        try {
          return await mergeOverlay(path, { into, backingRoots: backingRoot }, { progress: progress.update, signal });
        } catch (error) {
          throw withMountOf(path, error);
        }
      });
      if (!process.stdout.isTTY) return;
      process.stdout.write(`${printable(base)} has the contents of ${printable(path)} now\n`);
      for (const file of removed) process.stdout.write(`removed ${printable(file)}\n`);
    });
}

const collect = (value: string, earlier: readonly string[]): string[] => [...earlier, value];
