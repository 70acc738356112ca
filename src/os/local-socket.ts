/**
 * Connections to sockets of the UNIX domain whose descriptor is ours, so that descriptors can go through them: Node's
 * own sockets keep theirs to themselves. Structures differ between systems and are given as data; laying them out is pure.
 */
import { closeSync } from 'node:fs';
import { FsError } from '../errors.ts';
import { errnoNumber } from './errno.ts';
import { systemCall } from './library.ts';
import type { SystemCalls } from './system-calls.ts';

/** What differs between systems, from sys/un.h, sys/socket.h and sys/ucred.h. */
export interface LocalSocketAbi {
  /** struct sockaddr_un: what stands before the path, given the bytes of the whole, and the room for path and NUL. */
  readonly address: { readonly prefix: (bytes: number) => readonly number[]; readonly pathBytes: number };
  readonly SOCK_CLOEXEC: number;
  readonly SOCK_NONBLOCK: number;
  /** The option that tells who listened: level and name, the structure's size and the offset of its 32-bit pid. */
  readonly peer: { readonly level: number; readonly name: number; readonly bytes: number; readonly pidAt: number };
}

export const AF_UNIX = 1;
export const SOCKET_TYPES = { stream: 1, datagram: 2, seqpacket: 5 } as const;

/** struct sockaddr_un for `path`. @throws FsError ENAMETOOLONG */
export function encodeLocalAddress({ address }: LocalSocketAbi, path: string): Uint8Array {
  const name = Buffer.from(path);
  const start = address.prefix(0).length;
  if (name.length >= address.pathBytes) {
    throw new FsError(
      'ENAMETOOLONG',
      `the path of a socket has at most ${address.pathBytes - 1} bytes on this system, '${path}' has ${name.length}`,
    );
  }
  const bytes = start + name.length + 1;
  return Uint8Array.from([...address.prefix(bytes), ...name, 0]);
}

type LocalSockets = Pick<SystemCalls, 'connectLocal' | 'peerProcess'>;

/** The two calls for one system. */
export function localSockets(abi: LocalSocketAbi): LocalSockets {
  const socket = systemCall('int socket(int domain, int type, int protocol)');
  const connect = systemCall('int connect(int socket, void *address, uint32_t bytes)');
  const getsockopt = systemCall('int getsockopt(int socket, int level, int name, void *value, void *bytes)');

  return {
    connectLocal(path, type) {
      const address = encodeLocalAddress(abi, path);
      const fd = socket(AF_UNIX, SOCKET_TYPES[type] + abi.SOCK_CLOEXEC + abi.SOCK_NONBLOCK, 0);
      if (fd < 0) return fd;
      let result: number;
      do result = connect(fd, address, address.byteLength);
      while (result === -errnoNumber('EINTR'));
      if (result >= 0) return fd;
      closeSync(fd);
      return result;
    },

    peerProcess(fd) {
      const { level, name, bytes, pidAt } = abi.peer;
      const value = new Uint8Array(bytes);
      if (getsockopt(fd, level, name, value, Uint8Array.from([bytes, 0, 0, 0])) < 0) return undefined;
      const pid = new DataView(value.buffer).getInt32(pidAt, true);
      return pid > 0 ? pid : undefined;
    },
  };
}
