/** macOS, as far as vdskfs goes there: locks and sparse files, no holes punched, no descriptors passed. */
import { FsError } from '../errors.ts';
import { errnoNumber } from './errno.ts';
import { freebsd } from './freebsd.ts';
import { systemCall } from './library.ts';
import type { SystemCalls } from './system-calls.ts';

/** sys/unistd.h: data and hole are the other way round than on FreeBSD and Linux. */
const WHENCE = { end: 2, hole: 3, data: 4 } as const;

const lseek = systemCall('int64_t lseek(int fd, int64_t offset, int whence)');

const unknown = (call: string) => (): never => {
  throw new FsError('ENOTSUP', `${call} is not known on macOS`);
};

export const darwin: SystemCalls = {
  // flock(2) and its constants are FreeBSD's.
  ...freebsd,
  seek: (fd, offset, to) => lseek(fd, offset, WHENCE[to]),
  punchHole: () => -errnoNumber('ENOTSUP'),
  socketPair: unknown('socketpair(2) with close-on-exec'),
  send: unknown('sendmsg(2)'),
  receive: unknown('recvmsg(2)'),
  connectLocal: unknown('a socket with close-on-exec'),
  peerProcess: () => undefined,
};
