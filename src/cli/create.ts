import { dirname, resolve } from 'node:path';
import { type Command, Option } from 'commander';
import { type CreateOptions, createImage } from '../qcow2/create.ts';
import { HostFile } from '../storage/host-file.ts';
import { countArgument, example, sizeArgument } from './arguments.ts';
import { exitStatus } from './failure.ts';

type Format = 'qcow2' | 'raw';

interface CreateFlags {
  readonly backing?: string;
  readonly backingFormat?: Format;
  readonly clusterSize?: number;
  readonly compat?: 'v2' | 'v3';
  readonly refcountBits?: number;
  readonly extendedL2?: boolean;
  readonly lazyRefcounts?: boolean;
  readonly compressionType?: 'deflate' | 'zstd';
  readonly dataFile?: string;
  readonly dataFileRaw?: boolean;
  readonly preallocation?: 'off' | 'metadata';
}

export function addCreate(program: Command): void {
  program
    .command('create')
    .description('make a new image; an existing file is never overwritten')
    .argument('<image>', 'the qcow2 file to make')
    .argument(
      '[size]',
      'what the guest sees: 10G, 512M, 1.5T or plain bytes; left out: as the backing file',
      sizeArgument,
    )
    .option('--backing <file>', "where unwritten parts come from; relative to the image's folder")
    .addOption(new Option('--backing-format <f>', 'found out if left out').choices(['qcow2', 'raw']))
    .option('--cluster-size <size>', '512 to 2M, a power of two; left out: 64K', sizeArgument)
    .addOption(new Option('--compat <v>', 'v2 for very old programs; left out: v3').choices(['v2', 'v3']))
    .option('--refcount-bits <n>', '1, 2, 4 … 64; left out: 16', countArgument(1))
    .option('--extended-l2', 'allocate in 32nds of a cluster')
    .option('--lazy-refcounts', 'write refcounts late; a crash is mended at the next open')
    .addOption(new Option('--compression-type <t>', 'left out: deflate').choices(['deflate', 'zstd']))
    .option('--data-file <file>', "keep the guest's bytes in a file of their own; relative to the image's folder")
    .option('--data-file-raw', 'that file is the plain disk as well')
    .addOption(new Option('--preallocation <p>', 'left out: off').choices(['off', 'metadata']))
    .addHelpText('after', example('vdskfs create vm1.qcow2 40G', 'vdskfs create clone.qcow2 --backing vm1.qcow2'))
    .action((image: string, size: number | undefined, flags: CreateFlags, command: Command) => {
      const misuse = misuseOf(size, flags);
      if (misuse !== undefined) command.error(`vdskfs: ${misuse}`, { exitCode: exitStatus.USAGE });
      createImage(image, createOptions(image, size, flags));
    });
}

function misuseOf(size: number | undefined, flags: CreateFlags): string | undefined {
  if (size === undefined && flags.backing === undefined) return 'give a size, or --backing to take its size';
  if (flags.backingFormat !== undefined && flags.backing === undefined) return '--backing-format goes with --backing';
  if (flags.dataFileRaw && flags.dataFile === undefined) return '--data-file-raw goes with --data-file';
  return undefined;
}

function createOptions(image: string, size: number | undefined, flags: CreateFlags): CreateOptions {
  const { backing, dataFile } = flags;
  const given = {
    size,
    version: flags.compat === undefined ? undefined : flags.compat === 'v2' ? (2 as const) : (3 as const),
    clusterBytes: flags.clusterSize,
    refcountBits: flags.refcountBits,
    extendedL2: flags.extendedL2,
    lazyRefcounts: flags.lazyRefcounts,
    compressionType: flags.compressionType,
    backing:
      backing === undefined
        ? undefined
        : { file: backing, format: flags.backingFormat ?? formatOf(resolve(dirname(image), backing)) },
    dataFile: dataFile === undefined ? undefined : { file: dataFile, raw: flags.dataFileRaw ?? false },
    preallocation: flags.preallocation,
  };
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined)) as CreateOptions;
}

/** 'QFI\xfb'. Recorded once, now: a raw disk whose guest writes these bytes later must not become an image. */
const MAGIC = [0x51, 0x46, 0x49, 0xfb];

function formatOf(path: string): Format {
  using file = HostFile.open(path, { readOnly: true });
  const start = new Uint8Array(MAGIC.length);
  file.read(start, 0, start.length, 0);
  return MAGIC.every((byte, index) => start[index] === byte) ? 'qcow2' : 'raw';
}
