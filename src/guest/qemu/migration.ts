/** The guest's state into a file, by the command `migrate`: QEMU writes through a descriptor that we open. */
import { type FileHandle, open } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { FsError } from '../../errors.ts';
import { fsErrorFrom } from '../../os/errno.ts';
import { asArray, asObject, asText, isObject } from './json-fields.ts';
import { runningInstead, TAIL_BYTES } from './migration-stream.ts';
import type { QmpClient } from './qmp-client.ts';

/** How the descriptor is called in QEMU while it takes it over. */
const DESCRIPTOR_NAME = 'vdskfs-state';
const DESCRIPTOR_SET = 0x7664;
/** Bytes a second: no limit. The guest stands still meanwhile, and QEMU's own limit is meant for networks. */
const UNLIMITED = 2 ** 50;
/** Between questions; the guest may stand still for that much longer. */
const POLL_MS = 10;
const CANCEL_MS = 2_000;
/** Of a poll: QEMU's main loop may be held up by the last writes of a state. */
const PATIENCE_MS = 600_000;

const OVER = ['completed', 'failed', 'cancelled'];

/** @throws FsError EBUSY while QEMU migrates for someone else */
export async function refuseIfMigrating(qmp: QmpClient): Promise<void> {
  const { status } = await progress(qmp);
  if (status === undefined || status === 'none' || OVER.includes(status)) return;
  throw new FsError('EBUSY', `QEMU migrates this guest already (${status}): try again when that is over.`);
}

/**
 * Write the state of a guest that stands still. On a failure QEMU has given up and the guest can run on.
 * @throws FsError EIO with what QEMU said, the signal's reason
 */
export async function migrateToFile(qmp: QmpClient, path: string, signal: AbortSignal): Promise<void> {
  signal.throwIfAborted();
  const restore = await plainSettings(qmp);
  try {
    await start(qmp, path);
    await completion(qmp, signal);
  } finally {
    // Whatever happened, the guest's owner finds the settings as they were; a dead QEMU has none.
    await restore().catch(() => {});
  }
}

/** See `runningInstead`. */
export async function letStateRun(path: string): Promise<void> {
  await withFile(path, 'r+', async (file) => {
    const { size } = await file.stat();
    const from = Math.max(0, size - TAIL_BYTES);
    const tail = Buffer.alloc(size - from);
    const { bytesRead } = await file.read(tail, 0, tail.length, from);
    const change = runningInstead(tail.subarray(0, bytesRead));
    if (change !== undefined) await file.write(change.bytes, 0, change.bytes.length, from + change.at);
  });
}

/** Our copy of the descriptor is open for moments only: a file of our own mount must not outlive its server. */
async function withFile<T>(path: string, flags: string, work: (file: FileHandle) => Promise<T>): Promise<T> {
  const what = `cannot write the guest's state to '${path}'`;
  let file: FileHandle;
  try {
    file = await open(path, flags, 0o600);
  } catch (error) {
    throw fsErrorFrom(error, what);
  }
  try {
    return await work(file);
  } catch (error) {
    throw error instanceof Error && 'errno' in error ? fsErrorFrom(error, what) : error;
  } finally {
    await file.close();
  }
}

async function start(qmp: QmpClient, path: string): Promise<void> {
  const { major, minor } = qmp.version;
  // Since 9.1 fd: is for sockets and pipes; a file comes as a set of one descriptor, opened by its name.
  const bySet = major > 9 || (major === 9 && minor >= 1);
  await withFile(path, 'w', async ({ fd }) => {
    const passed = { descriptor: fd };
    if (bySet) await qmp.execute('add-fd', { 'fdset-id': DESCRIPTOR_SET, opaque: DESCRIPTOR_NAME }, passed);
    else await qmp.execute('getfd', { fdname: DESCRIPTOR_NAME }, passed);
  });
  try {
    await qmp.execute('migrate', { uri: bySet ? `file:/dev/fdset/${DESCRIPTOR_SET}` : `fd:${DESCRIPTOR_NAME}` });
  } catch (error) {
    await dropDescriptor(qmp, bySet);
    throw error;
  }
  if (bySet) await dropDescriptor(qmp, bySet); // QEMU goes on with a duplicate
}

async function dropDescriptor(qmp: QmpClient, bySet: boolean): Promise<void> {
  const dropped = bySet
    ? qmp.execute('remove-fd', { 'fdset-id': DESCRIPTOR_SET })
    : qmp.execute('closefd', { fdname: DESCRIPTOR_NAME });
  await dropped.catch(() => {}); // `migrate` may have taken it before it failed
}

async function completion(qmp: QmpClient, signal: AbortSignal): Promise<void> {
  for (;;) {
    const { status, reason } = await abortable(progress(qmp), signal).catch(async (error) => {
      if (signal.aborted) await cancel(qmp);
      throw error;
    });
    if (status === 'completed') return;
    if (status === undefined || OVER.includes(status)) {
      const full = /No space left on device|Disk quota exceeded/.test(reason ?? '');
      const why = reason ?? status ?? 'it does not say why';
      throw new FsError(full ? 'ENOSPC' : 'EIO', `QEMU did not save the guest's state: ${why}.`);
    }
    await sleep(POLL_MS);
  }
}

/** The answer, or the signal's reason if that comes first. */
async function abortable<T>(answer: Promise<T>, signal: AbortSignal): Promise<T> {
  signal.throwIfAborted();
  let abort: () => void = () => {};
  const aborted = new Promise<never>((_, reject) => {
    abort = () => reject(signal.reason);
    signal.addEventListener('abort', abort);
  });
  try {
    return await Promise.race([answer, aborted]);
  } finally {
    signal.removeEventListener('abort', abort);
    answer.catch(() => {}); // the signal's reason was told instead
  }
}

/** Ask QEMU to give up, and see that it has. It cannot while a write of its own is held up. */
async function cancel(qmp: QmpClient): Promise<void> {
  const deadline = Date.now() + CANCEL_MS;
  try {
    await qmp.execute('migrate_cancel', {}, { timeoutMs: CANCEL_MS });
    while (Date.now() < deadline && !OVER.includes((await progress(qmp)).status ?? 'none')) await sleep(POLL_MS);
  } catch {
    // A QEMU that answers no more is the caller's to find out about.
  }
}

async function progress(qmp: QmpClient): Promise<{ status: string | undefined; reason: string | undefined }> {
  const answer = await qmp.execute('query-migrate', {}, { timeoutMs: PATIENCE_MS });
  const { status, 'error-desc': reason } = asObject(answer, 'query-migrate');
  return {
    status: typeof status === 'string' ? status : undefined,
    reason: typeof reason === 'string' ? reason.replace(/\.$/, '') : undefined,
  };
}

/**
 * Settings under which the stream is a plain one at full speed, whatever the guest's owner has set for migrations to
 * other hosts: several channels, TLS or compression have no place in a file.
 * @returns how to put them back
 */
async function plainSettings(qmp: QmpClient): Promise<() => Promise<void>> {
  const listed = asArray(await qmp.execute('query-migrate-capabilities'), 'query-migrate-capabilities');
  const enabled = listed
    .filter((one) => isObject(one) && one.state === true && one.capability !== 'events')
    .map((one) => asText(asObject(one, 'a capability').capability, 'capability'));
  const parameters = asObject(await qmp.execute('query-migrate-parameters'), 'query-migrate-parameters');
  const before: Record<string, unknown> = {};
  for (const name of ['max-bandwidth', 'tls-creds']) {
    if (parameters[name] !== undefined) before[name] = parameters[name];
  }
  const setCapabilities = async (state: boolean): Promise<void> => {
    if (enabled.length === 0) return;
    const capabilities = enabled.map((capability) => ({ capability, state }));
    await qmp.execute('migrate-set-capabilities', { capabilities });
  };

  await setCapabilities(false);
  const plain = { 'max-bandwidth': UNLIMITED, ...(before['tls-creds'] === undefined ? {} : { 'tls-creds': '' }) };
  await qmp.execute('migrate-set-parameters', plain);
  return async () => {
    await qmp.execute('migrate-set-parameters', before);
    await setCapabilities(true);
  };
}
