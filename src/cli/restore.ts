import { spawn } from 'node:child_process';
import { constants } from 'node:os';
import { basename, join } from 'node:path';
import type { Command } from 'commander';
import { FsError } from '../errors.ts';
import { withRestore } from '../guest/bhyve/command-line.ts';
import { restoringArguments } from '../guest/qemu/command-line.ts';
import { fsErrorFrom } from '../os/errno.ts';
import { example } from './arguments.ts';
import { rollBackToRestore } from './mounted-target.ts';
import { mountedDisk } from './target.ts';

export function addRestore(program: Command): void {
  program
    .command('restore')
    .description("roll a guest's disks back to a checkpoint with memory, then start bhyve (or QEMU) from there")
    .usage('<disk> <name> -- bhyve <args...>')
    .argument('<disk>', "a disk's directory inside a mount")
    .argument('<name>', 'name of the checkpoint')
    .argument('<command...>', 'bhyve, and how the guest was started; -r and the file to restore from are put in')
    .addHelpText(
      'after',
      example(
        'vdskfs restore /mnt/vms/vm1 before-upgrade -- bhyve -c 2 -m 4G … -s 3,virtio-blk,/mnt/vms/vm1/disk.raw vm1',
      ),
    )
    .action(async (path: string, name: string, words: readonly string[]) => {
      const directory = mountedDisk(path);
      if (directory === undefined) {
        throw new FsError(
          'ENOTDIR',
          `${path}: an image file; mount it, and give the disk's directory inside the mount`,
        );
      }
      process.exitCode = await runToEnd(restoring(words, directory, rollBackToRestore(directory, name)));
    });
}

/** The guest's command line with what makes it start from its memory. */
function restoring(argv: readonly string[], directory: string, statePath: string): readonly string[] {
  if (!basename(argv[0] as string).startsWith('qemu')) return withRestore(argv, statePath);
  const diskPath = join(directory, 'disk.raw');
  return restoringArguments(argv, { statePath, diskPath, version: undefined }).argv;
}

/** Run a program in the place of this one. @returns its exit status, or as shells do 128 and the number of its signal */
function runToEnd([program, ...args]: readonly string[]): Promise<number> {
  return new Promise((resolve, reject) => {
    const child = spawn(program as string, args, { stdio: 'inherit' });
    // The terminal sends SIGINT to both: the guest's end is what counts.
    process.on('SIGINT', () => {});
    process.on('SIGTERM', () => child.kill('SIGTERM'));
    child.on('error', (error) => reject(fsErrorFrom(error, `cannot run ${program}`)));
    child.on('close', (status, signal) => resolve(status ?? 128 + constants.signals[signal as NodeJS.Signals]));
  });
}
