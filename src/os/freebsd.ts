/** FreeBSD on a 64-bit host (amd64, arm64, riscv64): constants and structures from sys/ of releases 13 to 15. */
import { i64, littleEndian, u32, u64 } from '../bytes/record.ts';
import { descriptorPassing, type SocketAbi } from './descriptor-passing.ts';
import { errnoNumber } from './errno.ts';
import { systemCall } from './library.ts';
import { AF_UNIX, type LocalSocketAbi, localSockets } from './local-socket.ts';
import type { SystemCalls } from './system-calls.ts';

/** sys/unistd.h */
const WHENCE = { end: 2, data: 3, hole: 4 } as const;

/** sys/fcntl.h, for flock(2) */
export const FLOCK_OPERATIONS = { shared: 1, exclusive: 2, none: 8 } as const;
export const LOCK_NB = 4;

/** sys/fcntl.h: the one command of fspacectl(2), since FreeBSD 14; ENOSYS before. */
const SPACECTL_DEALLOC = 1;

/** sys/fcntl.h, struct spacectl_range */
const spaceRange = littleEndian('spacectl_range', 16, { offset: i64, len: i64 });

/** The range to deallocate; the same structure takes what the kernel has left undone. */
export const encodeSpaceRange = (position: number, length: number): Uint8Array =>
  spaceRange.encode({ offset: BigInt(position), len: BigInt(length) });

export const decodeSpaceRange = (range: Uint8Array): { readonly position: number; readonly length: number } => {
  const { offset, len } = spaceRange.decode(range);
  return { position: Number(offset), length: Number(len) };
};

/** sys/socket.h, sys/_iovec.h */
export const freebsdSockets: SocketAbi = {
  messageHeader: littleEndian('msghdr', 48, {
    name: u64,
    nameBytes: u32,
    padding: u32,
    iov: u64,
    iovCount: u32,
    padding2: u32,
    control: u64,
    controlBytes: u32,
    flags: u32,
  }),
  // 12 bytes, then padding: the data starts at _ALIGN(sizeof(struct cmsghdr)).
  controlHeader: littleEndian('cmsghdr', 16, { len: u32, level: u32, type: u32, padding: u32 }),
  SOL_SOCKET: 0xffff,
  SOCK_CLOEXEC: 0x10000000,
  MSG_DONTWAIT: 0x80,
  MSG_NOSIGNAL: 0x20000,
  MSG_CMSG_CLOEXEC: 0x40000,
  MSG_CTRUNC: 0x20,
};

/** sys/un.h; LOCAL_PEERCRED of SOL_LOCAL and struct xucred of sys/ucred.h, cr_pid behind its 16 groups */
export const freebsdLocalSockets: LocalSocketAbi = {
  address: { prefix: (bytes) => [bytes, AF_UNIX], pathBytes: 104 },
  SOCK_CLOEXEC: 0x10000000,
  SOCK_NONBLOCK: 0x20000000,
  peer: { level: 0, name: 1, bytes: 88, pidAt: 80 },
};

const lseek = systemCall('int64_t lseek(int fd, int64_t offset, int whence)');
const flock = systemCall('int flock(int fd, int operation)');
const fspacectl = systemCall('int fspacectl(int fd, int command, void *range, int flags, void *remaining)');

/**
 * Deallocate the whole range by as many calls as it takes: fspacectl(2) may return early, also when a signal
 * interrupts it, with what is left in `range`.
 * @param call fspacectl(2) of a range that it updates
 */
export function deallocate(call: (range: Uint8Array) => number, position: number, length: number): number {
  const range = encodeSpaceRange(position, length);
  for (let left = length; left > 0; ) {
    const result = call(range);
    if (result < 0 && result !== -errnoNumber('EINTR')) return result;
    const { length: now } = decodeSpaceRange(range);
    // Nothing done and no reason given: beyond the end of the file there is nothing to free.
    if (result === 0 && now >= left) break;
    left = now;
  }
  return 0;
}

export const freebsd: SystemCalls = {
  seek: (fd, offset, to) => lseek(fd, offset, WHENCE[to]),
  punchHole: (fd, position, length) =>
    deallocate((range) => fspacectl(fd, SPACECTL_DEALLOC, range, 0, range), position, length),
  // No call that zeroes and keeps the blocks: the caller writes zeros.
  zeroRange: () => -errnoNumber('ENOTSUP'),
  locking: 'file',
  lockByte: () => -errnoNumber('ENOTSUP'),
  testByte: () => -errnoNumber('ENOTSUP'),
  lockFile: (fd, kind) => flock(fd, FLOCK_OPERATIONS[kind] + LOCK_NB),
  ...descriptorPassing(freebsdSockets),
  ...localSockets(freebsdLocalSockets),
};
