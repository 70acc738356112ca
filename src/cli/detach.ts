/** Starting the serving process in the background, and waiting until its tree answers. */
import { spawn } from 'node:child_process';
import { closeSync } from 'node:fs';
import { FsError } from '../errors.ts';
import { canonical } from '../fuse/mount-list.ts';
import { isServerMessage, type ServerMessage } from './server-message.ts';
import { logFile, openLog, removeLog } from './state.ts';

/** Set for the serving process only: it is the child, and must not start another. */
const MARK = 'VDSKFS_DETACHED';

/** Says once whether this process is a detached server; its own children are not. */
export function isDetachedServer(): boolean {
  const marked = process.env[MARK] === '1';
  delete process.env[MARK];
  return marked;
}

/**
 * Run this command again, detached from terminal and session, its output going to the log of `mountpoint`.
 * Resolves when the tree answers.
 * @throws FsError with the reason the server gave
 */
export async function startDetached(mountpoint: string): Promise<void> {
  const path = await canonical(mountpoint);
  const log = openLog(path);
  const child = spawn(process.execPath, [...process.execArgv, ...process.argv.slice(1)], {
    detached: true,
    stdio: ['ignore', log.fd, log.fd, 'ipc'],
    env: { ...process.env, [MARK]: '1' },
  });
  closeSync(log.fd);
  // Detached, it does not get the terminal's Ctrl-C: who interrupts this process means that one.
  const forward = (): void => void child.kill('SIGTERM');
  process.on('SIGINT', forward).on('SIGTERM', forward);
  try {
    const message = await new Promise<ServerMessage>((resolve, reject) => {
      child.on('error', reject);
      child.on('message', (value) => {
        if (isServerMessage(value)) resolve(value);
      });
      child.on('close', (status, signal) => {
        reject(
          new FsError('EIO', `the serving process ended with ${signal ?? `status ${status}`}; see ${logFile(path)}`),
        );
      });
    });
    if (message.kind === 'failed') {
      if (log.fresh) removeLog(path); // this process says all that is in it
      throw new FsError('EIO', message.message);
    }
  } finally {
    process.off('SIGINT', forward).off('SIGTERM', forward);
    if (child.connected) child.disconnect();
    child.unref();
  }
}
