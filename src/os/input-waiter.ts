/** poll(2), the same on all systems: POSIX fixes the structure's fields, and poll.h of each system gives POLLIN 1. */
import { i32, littleEndian, u16 } from '../bytes/record.ts';
import { systemCall } from './library.ts';

const POLLIN = 1;

const pollDescriptor = littleEndian('pollfd', 8, { fd: i32, events: u16, revents: u16 });

// nfds_t has 32 bits on FreeBSD and macOS, 64 on Linux; passed in a register, 1 is the same in both.
const poll = systemCall('int poll(void *fds, unsigned long count, int timeout)');

/** A function that tells, without waiting, whether read(2) of `fd` would return at once: with input, the end, or an error. */
export function inputWaiter(fd: number): () => boolean {
  const descriptor = pollDescriptor.encode({ fd, events: POLLIN });
  // Also where poll fails: read(2) will say what is wrong.
  return () => poll(descriptor, 1, 0) !== 0;
}
