/** /dev/fuse of one mount. Whoever opened it (the driver, on the main thread) closes it, after all threads have ended. */

import { readSync, writeSync, writevSync } from 'node:fs';
import { codeOf } from '../os/errno.ts';

/** What a data thread is given, as plain data: the descriptor is the process's, so any thread may use it. */
export interface DeviceAccess {
  readonly fd: number;
  /** Largest data of one READ or WRITE. */
  readonly requestBytes: number;
  /** How long a thread looks for the next request before it sleeps, in microseconds; 0: not at all. */
  readonly pollMicroseconds: number;
  /** One word: 1 while a thread of this mount polls. */
  readonly polled: SharedArrayBuffer;
}

/** Room beside the data of a WRITE, for its head and for requests with names (the kernel insists on 80 bytes). */
export const REQUEST_HEAD_BYTES = 4096;

/**
 * Take one request from the kernel, waiting for it, into `target`.
 * @returns its bytes; 0 when the mount has ended
 */
export function readRequest(fd: number, target: Uint8Array): number {
  for (;;) {
    try {
      return readSync(fd, target, 0, target.length, null);
    } catch (error) {
      switch (codeOf(error)) {
        case 'ENODEV': // unmounted
        case 'ECONNABORTED':
          return 0;
        case 'EINTR':
        case 'ENOENT': // taken back before it was read whole
        case 'EAGAIN':
          break;
        case 'EPERM': // opened, but not mounted yet
          Atomics.wait(pause, 0, 0, UNMOUNTED_PAUSE_MS);
          break;
        default:
          throw error;
      }
    }
  }
}

const UNMOUNTED_PAUSE_MS = 2;
const pause = new Int32Array(new SharedArrayBuffer(4));

/**
 * Give the kernel one whole message of `length` bytes.
 * @returns false if nobody waits for it any more: the request was given up, or the mount has ended
 */
export function writeReply(fd: number, message: Uint8Array, length: number): boolean {
  try {
    writeSync(fd, message, 0, length);
    return true;
  } catch (error) {
    return ignoreGone(error);
  }
}

/** The same, from its header and body. */
export function writeReplyParts(fd: number, header: Uint8Array, body: Uint8Array): boolean {
  try {
    writevSync(fd, [header, body]);
    return true;
  } catch (error) {
    return ignoreGone(error);
  }
}

function ignoreGone(error: unknown): false {
  const code = codeOf(error);
  if (code === 'ENOENT' || code === 'ENODEV' || code === 'EPERM') return false;
  throw error;
}
