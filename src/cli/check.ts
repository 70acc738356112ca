import { type Command, Option } from 'commander';
import { FsError } from '../errors.ts';
import { type CheckReport, checkImage } from '../qcow2/check.ts';
import { readHeader } from '../qcow2/header.ts';
import { HostFile } from '../storage/host-file.ts';
import { lockImage } from '../storage/image-lock.ts';
import { example, IMAGE } from './arguments.ts';
import { exitStatus } from './failure.ts';
import { withMountOf } from './image-target.ts';
import { showProgress } from './progress.ts';
import { formatSize } from './size.ts';
import { printable } from './table.ts';
import { mountedDisk } from './target.ts';
import { uninterrupted } from './uninterrupted.ts';

/** What exit statuses 2 and 3 mean here: those of qemu-img check. A repair counts by what is left. */
const checkStatus = { CORRUPTIONS: 2, LEAKS: 3 } as const;

type Repair = 'leaks' | 'all';

export function addCheck(program: Command): void {
  program
    .command('check')
    .description('compare the refcounts with what refers to each cluster; status 2: corruption found, 3: only leaks')
    .argument('<image>', IMAGE)
    .addOption(
      new Option('--repair <what>', 'leaks: give back space that nothing uses; all: make every refcount right').choices(
        ['leaks', 'all'],
      ),
    )
    .option('--json', 'for scripts')
    .addHelpText('after', example('vdskfs check vm1.qcow2', 'vdskfs check --repair all vm1.qcow2'))
    .action(async (path: string, { repair, json = false }: { repair?: Repair; json?: boolean }) => {
      const report =
        repair === undefined ? await check(path, undefined) : await uninterrupted(() => check(path, repair));
      process.stdout.write(json ? `${JSON.stringify({ image: path, ...report }, null, 2)}\n` : describe(report));
      process.exitCode = statusOf(report);
    });
}

/** Check, and repair, an image that nobody else has open. */
async function check(path: string, repair: Repair | undefined): Promise<CheckReport> {
  if (mountedDisk(path) !== undefined) {
    throw new FsError('EBUSY', `${path}: a disk of a mount cannot be checked; unmount it and give the image file`);
  }
  using file = HostFile.open(path, { readOnly: repair === undefined });
  try {
    lockImage(file.fd, path, repair === undefined ? 'read' : 'write');
  } catch (error) {
    throw withMountOf(path, error);
  }
  using progress = showProgress(`checking ${printable(path)}`);
  const header = readHeader(file, { refcountsUnusable: true });
  return await checkImage(file, header, { ...(repair === undefined ? {} : { repair }), onProgress: progress.update });
}

function statusOf({ corruptions, leaks }: CheckReport): number {
  if (corruptions > 0) return checkStatus.CORRUPTIONS;
  return leaks > 0 ? checkStatus.LEAKS : exitStatus.DONE;
}

/** What was found, what was done about it, and what is left. */
export function describe(report: CheckReport): string {
  const { corruptions, leaks, corruptionsFixed, leaksFixed, messages, messagesLeftOut } = report;
  const lines = messages.map(printable);
  if (messagesLeftOut > 0) lines.push(`… and ${messagesLeftOut} more`);
  const mended = corruptionsFixed + leaksFixed;
  if (mended > 0) lines.push(`Repaired: ${counted(corruptionsFixed, leaksFixed)}.`);
  if (corruptions + leaks > 0)
    lines.push(`Found: ${counted(corruptions, leaks)}${mended > 0 ? ' left' : ''}. ${advice(report)}`);
  else lines.push(mended > 0 ? 'The image is in order now.' : 'No errors were found.');
  const { allocatedClusters, totalClusters, compressedClusters, imageEndOffset } = report;
  const share = totalClusters === 0 ? 0 : Math.round((100 * allocatedClusters) / totalClusters);
  lines.push(
    `${allocatedClusters} of ${totalClusters} clusters allocated (${share} %), ${compressedClusters} compressed; ` +
      `the image ends at ${formatSize(imageEndOffset)}.`,
  );
  return `${lines.join('\n')}\n`;
}

const plural = (count: number, one: string): string => `${count} ${one}${count === 1 ? '' : 's'}`;

function counted(corruptions: number, leaks: number): string {
  const parts = [];
  if (corruptions > 0) parts.push(plural(corruptions, 'corruption'));
  if (leaks > 0) parts.push(plural(leaks, 'leaked cluster'));
  return parts.join(' and ');
}

const advice = ({ corruptions }: CheckReport): string =>
  corruptions > 0
    ? 'Make a copy of the file, then try --repair all.'
    : 'Leaks only waste space; --repair leaks gives it back.';
