import type { Command } from 'commander';
import type { Difference } from '../qcow2/difference.ts';
import { example, IMAGE_OR_DISK } from './arguments.ts';
import { findCheckpoint, withDisk } from './image-target.ts';
import { interruptible } from './interruptible.ts';
import { askDisk, quoted } from './mounted-target.ts';
import { showProgress } from './progress.ts';
import { formatSize } from './size.ts';
import { formatTable, printable } from './table.ts';
import { mountedDisk } from './target.ts';

export function addDiff(program: Command): void {
  program
    .command('diff')
    .description('list what changed between two checkpoints, or from one until now; no data is read')
    .argument('<image-or-disk>', IMAGE_OR_DISK)
    .argument('<from>', 'name of a checkpoint')
    .argument('[to]', 'name of another one; left out: the disk as it is now')
    .option('--json', 'for scripts')
    .addHelpText(
      'after',
      `\nWhole clusters are listed, and also those that were written with the bytes they had before.\n${example(
        'vdskfs diff vm1.qcow2 before-upgrade',
        'vdskfs diff /mnt/vms/vm1 monday tuesday --json',
      )}`,
    )
    .action(async (path: string, from: string, to: string | undefined, { json = false }: { json?: boolean }) => {
      const extents = await interruptible('nothing was changed', (signal) => differencesOf(path, { from, to, signal }));
      const changed = extents.reduce((sum, { length }) => sum + length, 0);
      const result = { from, to: to ?? null, changed, extents };
      process.stdout.write(json ? `${JSON.stringify(result, null, 2)}\n` : describe(extents, changed));
    });
}

/** Of an image file, or of a mounted disk. */
export async function differencesOf(
  path: string,
  { from, to, signal }: { readonly from: string; readonly to: string | undefined; readonly signal: AbortSignal },
): Promise<readonly Difference[]> {
  const directory = mountedDisk(path);
  if (directory !== undefined) {
    return JSON.parse(
      askDisk(directory, 'diff', quoted(from), ...(to === undefined ? [] : [quoted(to)])),
    ) as Difference[];
  }
  return withDisk(path, { readOnly: true }, (disk) => {
    using progress = showProgress(`comparing the tables of ${printable(path)}`);
    const later = to === undefined ? undefined : findCheckpoint(disk, to);
    return disk.differences(findCheckpoint(disk, from), later, { progress: progress.update, signal });
  });
}

function describe(extents: readonly Difference[], changed: number): string {
  if (extents.length === 0) return 'nothing changed\n';
  const rows = extents.map(({ offset, length, kind }) => [
    String(offset),
    String(length),
    kind === 'data' ? 'written' : 'zeros now',
  ]);
  return `${formatTable(columns, rows)}${formatSize(changed)} changed, in ${extents.length} ${extents.length === 1 ? 'extent' : 'extents'}\n`;
}

const columns = [
  { head: 'OFFSET', align: 'right' },
  { head: 'BYTES', align: 'right' },
  { head: 'WHAT', align: 'left' },
] as const;
