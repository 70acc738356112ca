/**
 * Entry module of the thread that writes notifications. Each write returns only when the kernel has done the work,
 * for which it may wait for requests still unanswered: so this thread serves none.
 */

import { parentPort, workerData } from 'node:worker_threads';
import { writeReply } from './device.ts';

parentPort?.on('message', (message: Uint8Array | null) => {
  if (message === null) parentPort?.close();
  // "No such node" or name: the kernel had nothing cached.
  else writeReply(workerData.fd, message, message.length);
});
