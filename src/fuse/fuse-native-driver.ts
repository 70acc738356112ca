import { FsError } from '../errors.ts';
import type { Driver } from './driver.ts';

export const mountFuseNative: Driver = async () => {
  throw new FsError('ENOTSUP', 'not yet');
};
