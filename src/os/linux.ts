/** Linux on a 64-bit host, glibc and musl alike: constants from the uapi headers of the generic architectures. */
import { littleEndian, u16, u32, u64 } from '../bytes/record.ts';
import { descriptorPassing, type SocketAbi } from './descriptor-passing.ts';
import { errnoNumber } from './errno.ts';
import { systemCall } from './library.ts';
import { AF_UNIX, type LocalSocketAbi, localSockets } from './local-socket.ts';
import type { ByteLock, SystemCalls } from './system-calls.ts';

/** unistd.h */
const WHENCE = { end: 2, data: 3, hole: 4 } as const;

/** linux/falloc.h */
const FALLOC_FL_KEEP_SIZE = 0x01;
const FALLOC_FL_PUNCH_HOLE = 0x02;
const FALLOC_FL_ZERO_RANGE = 0x10;

/** fcntl.h: locks owned by the open file description. `pid` must be zero. */
const F_OFD_GETLK = 36;
const F_OFD_SETLK = 37;
const LOCK_TYPES = { shared: 0, exclusive: 1, none: 2 } as const;

/** file.h, for flock(2) */
const FLOCK_OPERATIONS = { shared: 1, exclusive: 2, none: 8 } as const;
const LOCK_NB = 4;

/** struct flock of a 64-bit host. asm-generic/fcntl.h. `whence` 0: SEEK_SET. */
const fileLock = littleEndian('flock', 32, {
  type: u16,
  whence: u16,
  padding: u32,
  start: u64,
  len: u64,
  pid: u32,
  padding2: u32,
});

/** The argument of F_OFD_SETLK and F_OFD_GETLK for one byte. */
export const encodeByteLock = ({ offset, kind }: ByteLock): Uint8Array =>
  fileLock.encode({ type: LOCK_TYPES[kind], start: BigInt(offset), len: 1n });

/** Whether F_OFD_GETLK left the lock as "could be had". */
export const isFree = (answer: Uint8Array): boolean => fileLock.decode(answer).type === LOCK_TYPES.none;

/** linux/socket.h, asm-generic/socket.h, net.h */
export const linuxSockets: SocketAbi = {
  messageHeader: littleEndian('msghdr', 56, {
    name: u64,
    nameBytes: u32,
    padding: u32,
    iov: u64,
    iovCount: u32,
    iovCountHigh: u32,
    control: u64,
    controlBytes: u32,
    controlBytesHigh: u32,
    flags: u32,
    padding2: u32,
  }),
  controlHeader: littleEndian('cmsghdr', 16, { len: u32, lenHigh: u32, level: u32, type: u32 }),
  SOL_SOCKET: 1,
  SOCK_CLOEXEC: 0x80000,
  MSG_DONTWAIT: 0x40,
  MSG_NOSIGNAL: 0x4000,
  MSG_CMSG_CLOEXEC: 0x40000000,
  MSG_CTRUNC: 0x08,
};

/** linux/un.h, linux/net.h; SO_PEERCRED and struct ucred of asm-generic/socket.h and linux/socket.h */
export const linuxLocalSockets: LocalSocketAbi = {
  address: { prefix: () => [AF_UNIX, 0], pathBytes: 108 },
  SOCK_CLOEXEC: 0x80000,
  SOCK_NONBLOCK: 0x800,
  peer: { level: 1, name: 17, bytes: 12, pidAt: 0 },
};

const lseek = systemCall('int64_t lseek(int fd, int64_t offset, int whence)');
const fallocate = systemCall('int fallocate(int fd, int mode, int64_t offset, int64_t length)');
const flock = systemCall('int flock(int fd, int operation)');
// Variadic in C; with a pointer as the third argument the calling conventions of all supported machines are the same.
const fcntl = systemCall('int fcntl(int fd, int command, void *lock)');

export const linux: SystemCalls = {
  seek: (fd, offset, to) => lseek(fd, offset, WHENCE[to]),
  punchHole: (fd, position, length) => fallocate(fd, FALLOC_FL_PUNCH_HOLE + FALLOC_FL_KEEP_SIZE, position, length),
  zeroRange: (fd, position, length) => fallocate(fd, FALLOC_FL_ZERO_RANGE + FALLOC_FL_KEEP_SIZE, position, length),
  locking: 'bytes',
  lockByte: (fd, lock) => fcntl(fd, F_OFD_SETLK, encodeByteLock(lock)),
  testByte(fd, lock) {
    const answer = encodeByteLock(lock);
    const result = fcntl(fd, F_OFD_GETLK, answer);
    return result < 0 || isFree(answer) ? result : -errnoNumber('EAGAIN');
  },
  lockFile: (fd, kind) => flock(fd, FLOCK_OPERATIONS[kind] + LOCK_NB),
  ...descriptorPassing(linuxSockets),
  ...localSockets(linuxLocalSockets),
};
