import type { Command } from 'commander';
import { example, IMAGE_OR_DISK, sizeArgument } from './arguments.ts';
import { withTarget } from './target.ts';

export function addResize(program: Command): void {
  program
    .command('resize')
    .description('change the size that the guest sees; new space reads as zeros')
    .argument('<image-or-disk>', IMAGE_OR_DISK)
    .argument('<size>', 'new size: 10G, 512M, 1.5T or plain bytes', sizeArgument)
    .option('--shrink', 'allow a smaller size: the bytes behind it are lost')
    .addHelpText('after', example('vdskfs resize vm1.qcow2 40G', 'vdskfs resize --shrink vm1.qcow2 10G'))
    .action((path: string, bytes: number, { shrink = false }: { shrink?: boolean }) =>
      withTarget(path, (target) => target.resize(bytes, { shrink })),
    );
}
