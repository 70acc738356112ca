import type { Command } from 'commander';
import { example, IMAGE_OR_DISK } from './arguments.ts';
import { type ListedCheckpoint, type Listing, listingOf } from './listing.ts';
import { formatSize } from './size.ts';
import { formatTable, printable } from './table.ts';
import { formatClock, formatMoment } from './time.ts';

export function addLs(program: Command): void {
  program
    .command('ls')
    .description('list the checkpoints, oldest first, and the live disk last')
    .argument('<image-or-disk>', IMAGE_OR_DISK)
    .option('--json', 'for scripts')
    .addHelpText('after', example('vdskfs ls vm1.qcow2'))
    .action(async (path: string, { json = false }: { json?: boolean }) => {
      const listing = await listingOf(path);
      process.stdout.write(json ? `${JSON.stringify(asJson(listing), null, 2)}\n` : formatCheckpoints(listing));
    });
}

const asJson = ({ name, image, virtualSize, allocatedSize, snapshots, overlays }: Listing) => ({
  name,
  snapshots,
  overlays,
  live: { image, virtualSize, allocatedSize },
});

/** What is not known, or is not there. */
const NONE = '-';

/** The table of `ls`. How much of the image is a checkpoint's own is known to `vdskfs space` only. */
export function formatCheckpoints(listing: Listing): string {
  const rows = [...listing.snapshots, ...listing.overlays].map(checkpointRow);
  const live = ['(live)', 'now', formatSize(listing.virtualSize), formatSize(listing.allocatedSize), NONE, NONE];
  return formatTable(columns, [...rows, live]);
}

const columns = [
  { head: 'NAME', align: 'left' },
  { head: 'TAKEN', align: 'left' },
  { head: 'SIZE', align: 'right' },
  { head: 'OWN', align: 'right' },
  { head: 'MEMORY', align: 'right' },
  { head: 'CLOCK', align: 'right' },
] as const;

function checkpointRow(one: ListedCheckpoint): string[] {
  return [
    printable(one.name),
    formatMoment(Date.parse(one.created)),
    one.virtualSize === undefined ? NONE : formatSize(one.virtualSize),
    NONE,
    one.vmStateSize > 0 ? formatSize(one.vmStateSize) : NONE,
    one.vmClockNs ? formatClock(one.vmClockNs) : NONE,
  ];
}
