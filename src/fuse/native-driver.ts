/** The driver that speaks the kernel's protocol on /dev/fuse itself: Linux and FreeBSD. */

import { close } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { promisify } from 'node:util';
import { Worker } from 'node:worker_threads';
import createDebug from 'debug';
import { FsError } from '../errors.ts';
import type { FromDataThread } from './data-thread.ts';
import { type DeviceAccess, writeReply, writeReplyParts } from './device.ts';
import type { Driver, DriverCapabilities, Mounted } from './driver.ts';
import type { DataThreadSource, FileSystem } from './filesystem.ts';
import { REQUEST_BYTES } from './init.ts';
import { findStaleMount, mountAt } from './mount-list.ts';
import { clearStaleMount, mountDevice, mountingWay, unmountAndWait } from './mounting.ts';
import { DeviceNotifier } from './notifier.ts';
import { Session } from './session.ts';

const closeDescriptor = promisify(close);
const log = createDebug('vdskfs:fuse');
/** Bugs: what was thrown and is no expected failure. */
const logError = createDebug('vdskfs:error');

export const nativeCapabilities: DriverCapabilities = {
  seekData: true,
  allocate: true,
  notifications: true,
  requestBytes: REQUEST_BYTES,
};

/** Used by a file system without a data plane: its threads pass everything on. */
const deferring: DataThreadSource = {
  entry: new URL('./deferring-thread.js', import.meta.url),
  attach: () => ({ plane: undefined, transfer: [] }),
};

export const mountNative: Driver = async (fileSystem, options) => {
  const way = mountingWay();
  const fd = await mountDevice(options, way);
  const report = (error: unknown, operation: string): void => logError('%s failed: %O', operation, error);
  const session = new Session({
    fileSystem,
    system: way === 'freebsd' ? 'freebsd' : 'linux',
    send: (header, body) =>
      body.length === 0 ? writeReply(fd, header, header.length) : writeReplyParts(fd, header, body),
    report,
  });
  const notifier = new DeviceNotifier(fd, (error) => report(error, 'notification'));
  fileSystem.attachNotifier(notifier);

  const device = {
    fd,
    requestBytes: REQUEST_BYTES,
    pollMicroseconds: options.pollMicroseconds,
    polled: new SharedArrayBuffer(4),
  };
  const threads = startThreads(fileSystem, device, options.threads, session, report);
  const ended = threads.ended.then(async () => {
    await session.close();
    await notifier.close();
    await closeDescriptor(fd);
    // All threads broke: what is left would fail every access.
    const stale = await findStaleMount(options.mountpoint);
    if (stale !== undefined) await clearStaleMount(stale).catch((error) => report(error, 'unmount'));
    log('the mount at %s has ended', options.mountpoint);
  });

  try {
    await Promise.race([session.initialised, threads.failed]);
  } catch (error) {
    // Nobody can have opened anything yet.
    await clearStaleMount(options).catch((cause) => report(cause, 'unmount'));
    await ended;
    throw error;
  }
  await raiseReadAhead(options.mountpoint).catch((error) => log('read-ahead stays as it is: %s', error));
  log('mounted at %s with %d data threads', options.mountpoint, options.threads);
  return { capabilities: nativeCapabilities, ended, unmount: () => unmount() } satisfies Mounted;

  async function unmount(): Promise<void> {
    await unmountAndWait(way, options.mountpoint, ended);
  }
};

interface DataThreads {
  /** Resolves when all have returned: the device has ended. */
  readonly ended: Promise<void>;
  /** Rejects when one could not start or broke. */
  readonly failed: Promise<never>;
}

function startThreads(
  fileSystem: FileSystem,
  device: DeviceAccess,
  count: number,
  session: Session,
  report: (error: unknown, operation: string) => void,
): DataThreads {
  const source = fileSystem.dataThreads ?? deferring;
  const exits: Promise<void>[] = [];
  const failures: Promise<never>[] = [];
  for (let i = 0; i < count; i++) {
    const { plane, transfer } = source.attach();
    const thread = new Worker(source.entry, { workerData: { device, plane }, transferList: [...transfer] });
    thread.on('message', (message: FromDataThread) => {
      if (message.kind === 'request') session.receive(message.message);
      else report(new Error(message.reason), message.operation);
    });
    failures.push(
      new Promise((_, reject) => {
        thread.on('error', (cause) => {
          report(cause, 'data thread');
          reject(new FsError('EIO', `a data thread of the mount broke: ${String(cause)}`, { cause }));
        });
      }),
    );
    exits.push(new Promise((resolve) => thread.once('exit', () => resolve())));
  }
  const failed = Promise.race(failures);
  failed.catch(() => {}); // after the start it is only reported
  return { ended: Promise.all(exits).then(() => {}), failed };
}

/** Larger read-ahead than the 128 KiB that INIT can ask for: cached sequential reads then come 1 MiB at a time. */
async function raiseReadAhead(mountpoint: string): Promise<void> {
  if (process.platform !== 'linux') return;
  const device = (await mountAt(mountpoint))?.device;
  if (device !== undefined) await writeFile(`/sys/class/bdi/${device}/read_ahead_kb`, String(REQUEST_BYTES / 1024));
}
