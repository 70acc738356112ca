import type { Command } from 'commander';
import type { CheckpointSpace, Space } from '../disk/disk.ts';
import { example, IMAGE_OR_DISK } from './arguments.ts';
import { withDisk } from './image-target.ts';
import { interruptible } from './interruptible.ts';
import { askDisk } from './mounted-target.ts';
import { showProgress } from './progress.ts';
import { formatSize } from './size.ts';
import { formatTable, printable } from './table.ts';
import { mountedDisk } from './target.ts';

/** The JSON of `space`; the same that a mounted disk answers. Bytes. */
export interface SpaceListing {
  readonly checkpoints: readonly (Omit<CheckpointSpace, 'checkpoint'> & {
    readonly name: string;
    readonly kind: 'internal' | 'external';
  })[];
  readonly live: Space;
}

export function addSpace(program: Command): void {
  program
    .command('space')
    .description(
      'show for each checkpoint the bytes of its own, those that it shares, and those freed if it is deleted',
    )
    .argument('<image-or-disk>', IMAGE_OR_DISK)
    .option('--json', 'for scripts')
    .addHelpText(
      'after',
      `\nOWN and SHARED count clusters of the image, FREED what the host gets back when this one alone is deleted. What two\ncheckpoints share with no one else is free only when both are deleted.\n${example('vdskfs space vm1.qcow2')}`,
    )
    .action(async (path: string, { json = false }: { json?: boolean }) => {
      const listing = await interruptible('nothing was changed', (signal) => spaceOf(path, signal));
      process.stdout.write(json ? `${JSON.stringify(listing, null, 2)}\n` : describe(listing));
    });
}

export async function spaceOf(path: string, signal: AbortSignal): Promise<SpaceListing> {
  const directory = mountedDisk(path);
  if (directory !== undefined) return JSON.parse(askDisk(directory, 'space')) as SpaceListing;
  return withDisk(path, { readOnly: true }, async (disk) => {
    using progress = showProgress(`counting the clusters of ${printable(path)}`);
    const { checkpoints, live } = await disk.space({ progress: progress.update, signal });
    return {
      checkpoints: checkpoints.map(({ checkpoint: { name, kind }, ...bytes }) => ({ name, kind, ...bytes })),
      live,
    };
  });
}

function describe({ checkpoints, live }: SpaceListing): string {
  const row = (name: string, kind: string, { own, shared }: Space, freed: string): string[] => [
    name,
    kind,
    formatSize(own),
    formatSize(shared),
    freed,
  ];
  return formatTable(columns, [
    ...checkpoints.map((one) => row(printable(one.name), one.kind, one, formatSize(one.freed))),
    row('(live)', 'now', live, '-'),
  ]);
}

const columns = [
  { head: 'NAME', align: 'left' },
  { head: 'KIND', align: 'left' },
  { head: 'OWN', align: 'right' },
  { head: 'SHARED', align: 'right' },
  { head: 'FREED', align: 'right' },
] as const;
