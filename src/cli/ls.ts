import type { Command } from 'commander';
import { FsError } from '../errors.ts';
import { example, IMAGE_OR_DISK } from './arguments.ts';
import { checkpointTree, drawTree, type TreeNode } from './checkpoint-tree.ts';
import { interruptible } from './interruptible.ts';
import { type ListedCheckpoint, type Listing, listingOf } from './listing.ts';
import { formatSize } from './size.ts';
import { type SpaceListing, spaceOf } from './space.ts';
import { formatTable, printable } from './table.ts';
import { formatClock, formatMoment } from './time.ts';

export function addLs(program: Command): void {
  program
    .command('ls')
    .description('show the checkpoints as a tree, oldest first, and the live disk at the end')
    .argument('<image-or-disk>', IMAGE_OR_DISK)
    .option('--json', 'for scripts')
    .addHelpText(
      'after',
      `\nThe disk goes on from each checkpoint to the one below it; what was taken after one, and left by a roll back, hangs\non it. OWN is what only this checkpoint uses: vdskfs space says more.\n${example('vdskfs ls vm1.qcow2', 'vdskfs ls /mnt/vms/vm1 --json')}`,
    )
    .action(async (path: string, { json = false }: { json?: boolean }) => {
      const listing = await listingOf(path);
      const space = await spaceIfKnown(path, listing);
      process.stdout.write(
        json ? `${JSON.stringify(asJson(listing, space), null, 2)}\n` : formatCheckpoints(listing, space),
      );
    });
}

/** A damaged image is still listed. */
async function spaceIfKnown(path: string, { snapshots, overlays }: Listing): Promise<SpaceListing | undefined> {
  if (snapshots.length + overlays.length === 0) return undefined;
  try {
    return await interruptible('nothing was changed', (signal) => spaceOf(path, signal));
  } catch (error) {
    if (error instanceof FsError && error.errno !== 'EINTR') return undefined;
    throw error;
  }
}

type Kind = 'internal' | 'external';

const ownBytes = (space: SpaceListing | undefined, kind: Kind, name: string): number | undefined =>
  space?.checkpoints.find((one) => one.name === name && one.kind === kind)?.own;

function asJson(listing: Listing, space: SpaceListing | undefined) {
  const { name, image, virtualSize, allocatedSize, chain } = listing;
  const sized = (kind: Kind) => (one: ListedCheckpoint) => ({
    ...one,
    ownSize: ownBytes(space, kind, one.name) ?? null,
  });
  return {
    name,
    snapshots: listing.snapshots.map(sized('internal')),
    overlays: listing.overlays.map(sized('external')),
    live: { image, virtualSize, allocatedSize },
    chain,
    tree: checkpointTree(listing).map(nodeAsJson),
  };
}

interface JsonNode {
  readonly name: string | null;
  readonly kind: TreeNode['kind'];
  readonly branch: readonly JsonNode[];
}

const nodeAsJson = ({ checkpoint, kind, branch }: TreeNode): JsonNode => ({
  name: checkpoint?.name ?? null,
  kind,
  branch: branch.map(nodeAsJson),
});

/** What is not known, or is not there. */
const NONE = '-';

/** The table of `ls`. @param space left out: the sizes of their own are not shown */
export function formatCheckpoints(listing: Listing, space?: SpaceListing): string {
  const rows = drawTree(checkpointTree(listing)).map(({ lines, node: { checkpoint, kind } }) =>
    checkpoint === undefined
      ? [
          `${lines}(live)`,
          'now',
          NONE,
          formatSize(listing.virtualSize),
          space === undefined ? NONE : formatSize(space.live.own),
          NONE,
          NONE,
        ]
      : checkpointRow(lines, kind, checkpoint, ownBytes(space, kind as Kind, checkpoint.name)),
  );
  return formatTable(columns, rows);
}

const columns = [
  { head: 'NAME', align: 'left' },
  { head: 'TAKEN', align: 'left' },
  { head: 'KIND', align: 'left' },
  { head: 'SIZE', align: 'right' },
  { head: 'OWN', align: 'right' },
  { head: 'MEMORY', align: 'right' },
  { head: 'CLOCK', align: 'right' },
] as const;

function checkpointRow(lines: string, kind: string, one: ListedCheckpoint, own: number | undefined): string[] {
  return [
    lines + printable(one.name),
    formatMoment(Date.parse(one.created)),
    kind,
    one.virtualSize === undefined ? NONE : formatSize(one.virtualSize),
    own === undefined ? NONE : formatSize(own),
    one.vmStateSize > 0 ? formatSize(one.vmStateSize) : NONE,
    one.vmClockNs ? formatClock(one.vmClockNs) : NONE,
  ];
}
