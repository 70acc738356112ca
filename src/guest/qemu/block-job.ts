/** Long work on a disk in QEMU: a job that is started, watched until it has concluded, and dismissed. */
import { setTimeout as sleep } from 'node:timers/promises';
import { FsError } from '../../errors.ts';
import { asArray, asText, isObject, type JsonObject } from './json-fields.ts';
import type { QmpClient } from './qmp-client.ts';

const POLL_MS = 50;

let lastJob = 0;

/**
 * Run the command that starts a job to the job's end. One that gets ready (a commit of the active layer) is completed.
 * @param onProgress from 0 to 1
 * @throws FsError EIO with what QEMU says of a job that failed or was cancelled
 */
export async function runJob(
  qmp: QmpClient,
  command: string,
  args: JsonObject,
  onProgress: (fraction: number) => void,
): Promise<void> {
  const id = `vdskfs-${process.pid}-${++lastJob}`;
  // Not dismissed by itself: how it ended is known only as long as it is listed.
  await qmp.execute(command, { ...args, 'job-id': id, 'auto-dismiss': false });
  let completing = false;
  for (;;) {
    const job = await findJob(qmp, id);
    if (job === undefined) throw new FsError('EIO', `QEMU's ${command} vanished before it said how it ended.`);
    const { status, error, 'current-progress': done, 'total-progress': total } = job;
    if (typeof done === 'number' && typeof total === 'number' && total > 0) onProgress(Math.min(1, done / total));
    if (status === 'ready' && !completing) {
      await qmp.execute('job-complete', { id });
      completing = true;
    }
    if (status === 'concluded') {
      await qmp.execute('job-dismiss', { id });
      if (error === undefined) return;
      throw new FsError('EIO', `QEMU's ${command} failed: ${asText(error, 'error').replace(/\.?$/, '.')}`);
    }
    await sleep(POLL_MS);
  }
}

async function findJob(qmp: QmpClient, id: string): Promise<JsonObject | undefined> {
  const jobs = asArray(await qmp.execute('query-jobs'), 'query-jobs');
  return jobs.filter(isObject).find((job) => job.id === id);
}
