/** The system calls that Node lacks, with one implementation per system. None moves the data of a READ or a WRITE. */
import { FsError } from '../errors.ts';
import { darwin } from './darwin.ts';
import { freebsd } from './freebsd.ts';
import { linux } from './linux.ts';

/** A lock on one byte of a file. */
export interface ByteLock {
  readonly offset: number;
  readonly kind: 'shared' | 'exclusive' | 'none';
}

/** What came with one message. */
export interface ReceivedMessage {
  /** Bytes of data put into the buffer; 0 at the end of the stream. */
  readonly bytes: number;
  /** Descriptors that came along, close-on-exec, now the caller's to close. */
  readonly descriptors: readonly number[];
}

/**
 * Results below zero are negated errno numbers of this host; -ENOSYS where the system is too old to have the call. All
 * functions throw FsError ENOTSUP where koffi does not load.
 */
export interface SystemCalls {
  /** lseek(2) from `offset`. Moves the descriptor's file position, which positional I/O never looks at. */
  seek(fd: number, offset: number, to: 'data' | 'hole' | 'end'): number;
  /**
   * Deallocate the range, without a change of the file's size; it reads as zeros afterwards.
   * Returns 0, or -EOPNOTSUPP or -ENOSYS with nothing changed where the file system cannot.
   */
  punchHole(fd: number, position: number, length: number): number;
  /** Make the range read as zeros, allocated and without a change of the file's size. Same results as `punchHole`. */
  zeroRange(fd: number, position: number, length: number): number;
  /** How this system locks an image: single bytes, owned by the open file description, or the whole file. */
  readonly locking: 'bytes' | 'file';
  /** Lock or unlock one byte without waiting, owned by the open file description. 0, or -EAGAIN where someone else's lock is in the way. */
  lockByte(fd: number, lock: ByteLock): number;
  /** Whether `lock` could be had: 0, or -EAGAIN. Takes nothing. */
  testByte(fd: number, lock: ByteLock): number;
  /** flock(2) without waiting. 0, or -EWOULDBLOCK. Going from shared to exclusive may lose the shared lock. */
  lockFile(fd: number, kind: ByteLock['kind']): number;
  /** Two connected sockets of the UNIX domain, both close-on-exec. @throws FsError EIO where descriptors have run out */
  socketPair(type: 'stream' | 'datagram' | 'seqpacket'): readonly [number, number];
  /**
   * A socket, close-on-exec and non-blocking, connected to the one of the UNIX domain at `path`; the descriptor is the
   * caller's to close. -EAGAIN where the listener has no room for another connection now (FreeBSD: -ECONNREFUSED).
   * @throws FsError ENAMETOOLONG
   */
  connectLocal(path: string, type: 'stream' | 'datagram' | 'seqpacket'): number;
  /** The process that listened where this connected stream socket leads; undefined if the system does not tell. */
  peerProcess(socket: number): number | undefined;
  /**
   * recvmsg(2) of one message into `target`, with the descriptors that came along.
   * @throws FsError EAGAIN if `wait` is false and there is none; ENOTSUP, EIO …
   */
  receive(socket: number, target: Uint8Array, wait: boolean): ReceivedMessage;
  /** sendmsg(2) of `data` (at least one byte) with `descriptors`. Returns the bytes taken. @throws FsError */
  send(socket: number, data: Uint8Array, descriptors: readonly number[]): number;
}

const SYSTEMS: Partial<Record<NodeJS.Platform, SystemCalls>> = { linux, freebsd, darwin };

/** @throws FsError ENOTSUP on a system whose calls are not known */
export function systemCalls(): SystemCalls {
  const found = SYSTEMS[process.platform];
  if (found === undefined) {
    throw new FsError('ENOTSUP', `vdskfs knows no system calls of ${process.platform}: it runs on Linux and FreeBSD`);
  }
  return found;
}
