import { dirname, join } from 'node:path';
import { type Command, Option } from 'commander';
import { type ByteSpan, copyToImage, copyToRaw } from '../disk/copy-out.ts';
import type { Work } from '../disk/disk.ts';
import { type ExportBacking, exportBacking } from '../disk/export-backing.ts';
import { encodeOrigin } from '../disk/export-origin.ts';
import { compressorFor } from '../qcow2/compressor.ts';
import { ImageWriter } from '../qcow2/image-writer.ts';
import type { HostFile } from '../storage/host-file.ts';
import { writeNewFile } from '../storage/new-file.ts';
import { example, IMAGE_OR_DISK } from './arguments.ts';
import { splitCheckpointPath } from './checkpoint-path.ts';
import { type ExportSource, withSource } from './export-source.ts';
import { exitStatus } from './failure.ts';
import { interruptible } from './interruptible.ts';
import { showProgress } from './progress.ts';
import { printable } from './table.ts';

interface ExportFlags {
  readonly format?: 'raw' | 'qcow2';
  readonly compress?: 'zlib' | 'zstd';
  readonly since?: string;
  readonly backing?: string;
}

const CLUSTER_BYTES = 65536;
/** In smaller ones the header has no room for names. */
const LEAST_CLUSTER_BYTES = 4096;
const compressionTypes = { zlib: 'deflate', zstd: 'zstd' } as const;

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
    .option('--since <name>', 'only what changed since that checkpoint: a thin qcow2 over a file that holds it')
    .option('--backing <file>', 'with --since: the file that holds the earlier checkpoint; found if left out')
    .addHelpText(
      'after',
      `
A thin file stands on one that holds the earlier checkpoint, by a name relative to its own folder: for an external
checkpoint the file that is frozen since, else an export of that checkpoint in the same folder, else NAME.qcow2 there,
which may be made later. The file appears when it is complete: an export that fails, or that Ctrl-C ends, leaves nothing.\n${example(
        'vdskfs export vm1.qcow2@before-upgrade before.qcow2 --compress zstd',
        'vdskfs export /mnt/vms/vm1 vm1.raw',
        'vdskfs export vm1.qcow2@tuesday tuesday.qcow2 --since monday',
      )}`,
    )
    .action(async (from: string, file: string, flags: ExportFlags, command: Command) => {
      const format = flags.format ?? (/\.(raw|img)$/i.test(file) ? 'raw' : 'qcow2');
      const misuse = misuseOf(format, flags);
      if (misuse !== undefined) command.error(`vdskfs: ${misuse}`, { exitCode: exitStatus.USAGE });
      await interruptible(`${printable(file)} was not written`, (signal) =>
        exportTo(file, from, format, flags, signal),
      );
    });
}

function misuseOf(format: 'raw' | 'qcow2', { compress, since, backing }: ExportFlags): string | undefined {
  if (format === 'raw' && compress !== undefined) return 'a raw file cannot be compressed; --compress goes with qcow2';
  if (format === 'raw' && since !== undefined) return 'a raw file stands on nothing; --since goes with qcow2';
  if (backing !== undefined && since === undefined) return '--backing goes with --since';
  return undefined;
}

async function exportTo(
  file: string,
  from: string,
  format: 'raw' | 'qcow2',
  flags: ExportFlags,
  signal: AbortSignal,
): Promise<void> {
  using progress = showProgress(`exporting ${printable(from)}`);
  const work = { progress: progress.update, signal };
  let backing: ExportBacking | undefined;
  await writeNewFile(file, (target) =>
    withSource(splitCheckpointPath(from), async (exported) => {
      if (format === 'raw') return copyToRaw(exported.source, target, work);
      if (flags.since === undefined) return writeImage(target, exported, undefined, flags, work);
      return exported.withEarlier(flags.since, work, async (changed, earlier) => {
        backing = await exportBacking(file, earlier, flags.backing, work);
        const thin = { changed, backing, backingBytes: earlier.contents.size() };
        await writeImage(target, exported, thin, flags, work);
      });
    }),
  );
  if (backing?.exists === false) {
    const missing = join(dirname(file), backing.file);
    const earlier = `${splitCheckpointPath(from).path}@${flags.since}`;
    process.stdout.write(
      `${printable(file)} stands on ${printable(missing)}, which is still to be made: vdskfs export ${printable(earlier)} ${printable(missing)}\n`,
    );
  }
}

interface Thin {
  readonly changed: readonly ByteSpan[];
  readonly backing: ExportBacking;
  /** Bytes of its disk. */
  readonly backingBytes: number;
}

async function writeImage(
  target: HostFile,
  { source, origin, clusterBytes }: ExportSource,
  thin: Thin | undefined,
  { compress }: ExportFlags,
  work: Work,
): Promise<void> {
  const type = compress === undefined ? undefined : compressionTypes[compress];
  const image = new ImageWriter(target, {
    size: source.size(),
    // What changed is known by clusters of the source.
    clusterBytes: thin === undefined ? CLUSTER_BYTES : Math.max(clusterBytes, LEAST_CLUSTER_BYTES),
    ...(type === undefined ? {} : { compressionType: type }),
    ...(thin === undefined ? {} : { backing: { file: thin.backing.file, format: thin.backing.format } }),
    extensions: origin === undefined ? [] : [encodeOrigin(origin)],
  });
  await copyToImage(
    source,
    image,
    {
      ...(type === undefined ? {} : { compress: await compressorFor(type) }),
      ...(thin === undefined ? {} : { spans: thin.changed, backingBytes: thin.backingBytes }),
    },
    work,
  );
}
