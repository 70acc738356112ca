/** Entry module of a data thread. */
import { workerData } from 'node:worker_threads';
import { attachContents } from '../disk/attach-contents.ts';
import { serveDevice } from '../fuse/data-thread.ts';
import { ThreadPlane } from './thread-plane.ts';

serveDevice(workerData.device, new ThreadPlane(workerData.plane, attachContents));
