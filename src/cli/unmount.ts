import type { Command } from 'commander';
import { example } from './arguments.ts';
import { say } from './log.ts';
import { endMount } from './unmounting.ts';

export function addUnmount(program: Command): void {
  program
    .command('unmount')
    .description('end a mount cleanly: everything is written out and the locks are released when this returns')
    .argument('<mountpoint>', 'where it is mounted; the mount of a process that died is taken away, too')
    .addHelpText('after', example('vdskfs unmount /mnt/vms'))
    .action((mountpoint: string) =>
      endMount(mountpoint, (what) => {
        if (process.stderr.isTTY) say(`waiting until ${what}`);
      }),
    );
}
