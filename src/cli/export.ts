import { type Command, Option } from 'commander';
import { copyToImage, copyToRaw } from '../disk/copy-out.ts';
import { compressorFor } from '../qcow2/compressor.ts';
import { ImageWriter } from '../qcow2/image-writer.ts';
import { writeNewFile } from '../storage/new-file.ts';
import { example, IMAGE_OR_DISK } from './arguments.ts';
import { splitCheckpointPath } from './checkpoint-path.ts';
import { withSource } from './export-source.ts';
import { exitStatus } from './failure.ts';
import { interruptible } from './interruptible.ts';
import { showProgress } from './progress.ts';
import { printable } from './table.ts';

interface ExportFlags {
  readonly format?: 'raw' | 'qcow2';
  readonly compress?: 'zlib' | 'zstd';
}

const CLUSTER_BYTES = 65536;

export function addExport(program: Command): void {
  program
    .command('export')
    .description('copy what the disk holds now, or held at a checkpoint, to a file of its own')
    .argument('<image-or-disk[@name]>', `${IMAGE_OR_DISK}; behind an @ the name of a checkpoint`)
    .argument('<file>', 'the file to make; an existing one is never overwritten')
    .addOption(
      new Option('--format <f>', 'left out: raw if the file ends in .raw or .img, else qcow2').choices([
        'raw',
        'qcow2',
      ]),
    )
    .addOption(new Option('--compress <how>', 'compress the clusters of a qcow2').choices(['zlib', 'zstd']))
    .addHelpText(
      'after',
      `\nThe file appears when it is complete: an export that fails, or that Ctrl-C ends, leaves nothing.\n${example(
        'vdskfs export vm1.qcow2@before-upgrade before.qcow2 --compress zstd',
        'vdskfs export /mnt/vms/vm1 vm1.raw',
      )}`,
    )
    .action(async (from: string, file: string, flags: ExportFlags, command: Command) => {
      const format = flags.format ?? (/\.(raw|img)$/i.test(file) ? 'raw' : 'qcow2');
      if (format === 'raw' && flags.compress !== undefined) {
        command.error('vdskfs: a raw file cannot be compressed; --compress goes with --format qcow2', {
          exitCode: exitStatus.USAGE,
        });
      }
      await interruptible(`${printable(file)} was not written`, (signal) =>
        exportTo(file, from, format, flags, () => signal.throwIfAborted()),
      );
    });
}

async function exportTo(
  file: string,
  from: string,
  format: 'raw' | 'qcow2',
  { compress }: ExportFlags,
  check: () => void,
): Promise<void> {
  using progress = showProgress(`exporting ${printable(from)}`);
  const work = { progress: progress.update, check };
  const compressionType = compress === 'zstd' ? 'zstd' : 'deflate';
  await writeNewFile(file, (target) =>
    withSource(splitCheckpointPath(from), async (source) => {
      if (format === 'raw') return copyToRaw(source, target, work);
      const compressor = compress === undefined ? undefined : await compressorFor(compressionType);
      const image = new ImageWriter(target, {
        size: source.size(),
        clusterBytes: CLUSTER_BYTES,
        ...(compress === undefined ? {} : { compressionType }),
      });
      await copyToImage(source, image, { compress: compressor }, work);
    }),
  );
}
