import { statSync } from 'node:fs';
import type { Command } from 'commander';
import { example, IMAGE_OR_DISK } from './arguments.ts';
import { type Listing, listingOf } from './listing.ts';
import { formatCheckpoints } from './ls.ts';
import { formatSize } from './size.ts';
import { formatTable, printable } from './table.ts';

export function addInfo(program: Command): void {
  program
    .command('info')
    .description('show size, format, chain and checkpoints')
    .argument('<image-or-disk>', IMAGE_OR_DISK)
    .option('--json', 'for scripts')
    .option('--chain', 'show every file that the disk is made of')
    .addHelpText('after', example('vdskfs info vm1.qcow2', 'vdskfs info --chain overlay.qcow2'))
    .action(async (path: string, { json = false, chain = false }: { json?: boolean; chain?: boolean }) => {
      const listing = await listingOf(path);
      process.stdout.write(json ? `${JSON.stringify(listing, null, 2)}\n` : describe(listing, { chain }));
    });
}

function describe(listing: Listing, { chain }: { readonly chain: boolean }): string {
  const { format } = listing;
  const backing = listing.chain[1];
  const count = listing.snapshots.length + listing.overlays.length;
  const lines: [string, string][] = [
    ['image', printable(listing.image)],
    ['size', `${formatSize(listing.virtualSize)} (${listing.virtualSize} bytes)`],
    ['on the host', formatSize(listing.allocatedSize)],
    ['format', `qcow2 version ${format.version}`],
    ['clusters', formatSize(format.clusterSize)],
    ['refcounts', `${format.refcountBits} bits`],
    ['features', format.features.length === 0 ? 'none' : format.features.map(printable).join(', ')],
    ['backing file', backing === undefined ? 'none' : `${printable(backing.file)} (${backing.format})`],
    ['checkpoints', count === 0 ? 'none' : String(count)],
  ];
  const width = Math.max(...lines.map(([key]) => key.length)) + 2;
  const text = lines.map(([key, value]) => `${`${key}:`.padEnd(width)}${value}\n`).join('');
  return text + (count > 0 ? `\n${formatCheckpoints(listing)}` : '') + (chain ? `\n${formatChain(listing)}` : '');
}

/** All layers, the one that is written first. */
const formatChain = ({ chain }: Listing): string =>
  formatTable(
    [
      { head: 'LAYER', align: 'right' },
      { head: 'FORMAT', align: 'left' },
      { head: 'SIZE', align: 'right' },
      { head: 'ON HOST', align: 'right' },
      { head: 'FILE', align: 'left' },
    ],
    chain.map(({ file, format, virtualSize }, index) => [
      String(index),
      format,
      formatSize(virtualSize),
      hostSize(file),
      printable(file),
    ]),
  );

/** st_blocks counts 512 bytes whatever the file system's block size (stat(2)). */
function hostSize(file: string): string {
  const stat = statSync(file, { throwIfNoEntry: false });
  return stat === undefined ? '-' : formatSize(stat.blocks * 512);
}
