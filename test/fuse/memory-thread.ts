/** Entry module of the data threads of these tests. */

import { workerData } from 'node:worker_threads';
import { serveDevice } from '../../src/fuse/data-thread.ts';
import { memoryPlane } from './memory-disk.ts';

serveDevice(workerData.device, memoryPlane(workerData.plane, true));
