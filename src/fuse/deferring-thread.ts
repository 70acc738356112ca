/** Entry module of a data thread for a file system without a data plane: everything goes to the main thread. */

import { workerData } from 'node:worker_threads';
import { type DataPlane, DEFER } from './data-plane.ts';
import { serveDevice } from './data-thread.ts';

const defer = (): number => DEFER;

const plane: DataPlane = {
  read: defer,
  write: defer,
  seek: defer,
  allocate: defer,
  flush: defer,
  sync: defer,
  tidy() {},
};

serveDevice(workerData.device, plane);
