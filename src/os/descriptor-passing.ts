/**
 * Descriptors through a UNIX socket: socketpair(2), and sendmsg(2) and recvmsg(2) with SCM_RIGHTS control messages.
 * Constants and structures differ between systems and are given as data; laying them out is pure.
 */
import { closeSync } from 'node:fs';
import { littleEndian, u64 } from '../bytes/record.ts';
import { FsError } from '../errors.ts';
import { errnoNumber, fsErrorFrom } from './errno.ts';
import { addressOf, systemCall } from './library.ts';
import { AF_UNIX, SOCKET_TYPES } from './local-socket.ts';
import type { ReceivedMessage, SystemCalls } from './system-calls.ts';

/** What differs between systems, from sys/socket.h. */
export interface SocketAbi {
  /** struct msghdr. size_t fields are two halves, the upper one never used. */
  readonly messageHeader: {
    readonly bytes: number;
    readonly at: { readonly controlBytes: number; readonly flags: number };
    encode(value: MessageHeader, target?: Uint8Array, offset?: number): Uint8Array;
  };
  /** struct cmsghdr with the padding up to its data, which is 16 bytes on all supported 64-bit systems. */
  readonly controlHeader: {
    readonly bytes: number;
    encode(value: ControlHeader, target?: Uint8Array, offset?: number): Uint8Array;
    decode(source: Uint8Array, offset?: number): ControlHeader;
  };
  readonly SOL_SOCKET: number;
  readonly SOCK_CLOEXEC: number;
  readonly MSG_DONTWAIT: number;
  readonly MSG_NOSIGNAL: number;
  readonly MSG_CMSG_CLOEXEC: number;
  readonly MSG_CTRUNC: number;
}

interface MessageHeader {
  readonly iov: bigint;
  readonly iovCount: number;
  readonly control: bigint;
  readonly controlBytes: number;
}

interface ControlHeader {
  /** Header and data, without the padding after them. */
  readonly len: number;
  readonly level: number;
  readonly type: number;
}

/** struct iovec of every 64-bit system. */
const ioVector = littleEndian('iovec', 16, { base: u64, len: u64 });

const SCM_RIGHTS = 1;
/** CMSG_ALIGN (Linux) and _ALIGN (FreeBSD) on 64-bit hosts. */
const CONTROL_ALIGNMENT = 8;
const DESCRIPTOR_BYTES = 4;
/** Per message. The systems allow more: 253 on Linux, about 500 on FreeBSD. */
export const MAX_DESCRIPTORS = 64;

const aligned = (bytes: number): number => Math.ceil(bytes / CONTROL_ALIGNMENT) * CONTROL_ALIGNMENT;

/** One SCM_RIGHTS control message, padded as CMSG_SPACE has it; no bytes at all for no descriptors. */
export function encodeRights(abi: SocketAbi, descriptors: readonly number[]): Uint8Array {
  if (descriptors.length === 0) return new Uint8Array(0);
  const header = abi.controlHeader.bytes;
  const len = header + descriptors.length * DESCRIPTOR_BYTES;
  const control = new Uint8Array(aligned(len));
  abi.controlHeader.encode({ len, level: abi.SOL_SOCKET, type: SCM_RIGHTS }, control);
  const view = new DataView(control.buffer, control.byteOffset, control.byteLength);
  descriptors.forEach((fd, index) => {
    view.setInt32(header + index * DESCRIPTOR_BYTES, fd, true);
  });
  return control;
}

/** All descriptors in the control messages that recvmsg(2) filled in; messages of other kinds are passed over. */
export function decodeRights(abi: SocketAbi, control: Uint8Array): number[] {
  const descriptors: number[] = [];
  const view = new DataView(control.buffer, control.byteOffset, control.byteLength);
  const header = abi.controlHeader.bytes;
  for (let at = 0; at + header <= control.byteLength; ) {
    const { len, level, type } = abi.controlHeader.decode(control, at);
    if (len < header || at + len > control.byteLength) break;
    if (level === abi.SOL_SOCKET && type === SCM_RIGHTS) {
      for (let from = at + header; from + DESCRIPTOR_BYTES <= at + len; from += DESCRIPTOR_BYTES) {
        descriptors.push(view.getInt32(from, true));
      }
    }
    at += aligned(len);
  }
  return descriptors;
}

/** Everything one sendmsg(2) or recvmsg(2) points at, in one piece of memory: header, iovec, control, data. */
export interface Message {
  readonly memory: Uint8Array;
  readonly control: { readonly at: number; readonly bytes: number };
  readonly data: { readonly at: number; readonly bytes: number };
}

/** Lay a message out in `memory`, which the kernel will find at `address`; allocate `messageBytes` for it. */
export function layOutMessage(
  abi: SocketAbi,
  memory: Uint8Array,
  address: bigint,
  sizes: { readonly control: number; readonly data: number },
): Message {
  const vectorAt = aligned(abi.messageHeader.bytes);
  const controlAt = vectorAt + ioVector.bytes;
  const dataAt = controlAt + aligned(sizes.control);
  abi.messageHeader.encode(
    {
      iov: address + BigInt(vectorAt),
      iovCount: 1,
      control: sizes.control === 0 ? 0n : address + BigInt(controlAt),
      controlBytes: sizes.control,
    },
    memory,
  );
  ioVector.encode({ base: address + BigInt(dataAt), len: BigInt(sizes.data) }, memory, vectorAt);
  return {
    memory,
    control: { at: controlAt, bytes: sizes.control },
    data: { at: dataAt, bytes: sizes.data },
  };
}

/** Bytes of memory for a message of these sizes. */
export const messageBytes = (abi: SocketAbi, sizes: { readonly control: number; readonly data: number }): number =>
  aligned(abi.messageHeader.bytes) + ioVector.bytes + aligned(sizes.control) + sizes.data;

function newMessage(abi: SocketAbi, sizes: { readonly control: number; readonly data: number }): Message {
  const memory = new ArrayBuffer(messageBytes(abi, sizes));
  return layOutMessage(abi, new Uint8Array(memory), addressOf(memory), sizes);
}

type DescriptorPassing = Pick<SystemCalls, 'socketPair' | 'send' | 'receive'>;

/** The three calls for one system. */
export function descriptorPassing(abi: SocketAbi): DescriptorPassing {
  const socketpair = systemCall('int socketpair(int domain, int type, int protocol, void *sockets)');
  const sendmsg = systemCall('int64_t sendmsg(int socket, void *message, int flags)');
  const recvmsg = systemCall('int64_t recvmsg(int socket, void *message, int flags)');

  return {
    socketPair(type) {
      const sockets = new Uint8Array(2 * DESCRIPTOR_BYTES);
      const result = socketpair(AF_UNIX, SOCKET_TYPES[type] + abi.SOCK_CLOEXEC, 0, sockets);
      if (result < 0) throw fsErrorFrom(-result, 'cannot make a pair of sockets');
      const view = new DataView(sockets.buffer);
      return [view.getInt32(0, true), view.getInt32(DESCRIPTOR_BYTES, true)];
    },

    send(socket, data, descriptors) {
      if (descriptors.length > MAX_DESCRIPTORS) {
        throw new FsError('EINVAL', `a message takes ${MAX_DESCRIPTORS} descriptors, not ${descriptors.length}`);
      }
      const rights = encodeRights(abi, descriptors);
      const message = newMessage(abi, { control: rights.byteLength, data: data.byteLength });
      message.memory.set(rights, message.control.at);
      message.memory.set(data, message.data.at);
      const sent = uninterrupted(() => sendmsg(socket, message.memory, abi.MSG_NOSIGNAL));
      if (sent < 0) throw fsErrorFrom(-sent, `cannot send ${descriptors.length} descriptors through a socket`);
      return sent;
    },

    receive(socket, target, wait): ReceivedMessage {
      const room = abi.controlHeader.bytes + MAX_DESCRIPTORS * DESCRIPTOR_BYTES;
      const message = newMessage(abi, { control: room, data: target.byteLength });
      const flags = abi.MSG_CMSG_CLOEXEC + (wait ? 0 : abi.MSG_DONTWAIT);
      const bytes = uninterrupted(() => recvmsg(socket, message.memory, flags));
      if (bytes < 0) throw fsErrorFrom(-bytes, 'cannot receive descriptors through a socket');

      const view = new DataView(message.memory.buffer);
      const filled = view.getUint32(abi.messageHeader.at.controlBytes, true);
      const { at } = message.control;
      const descriptors = decodeRights(abi, message.memory.subarray(at, at + Math.min(filled, room)));
      if ((view.getUint32(abi.messageHeader.at.flags, true) & abi.MSG_CTRUNC) !== 0) {
        for (const fd of descriptors) closeSync(fd);
        throw new FsError(
          'EIO',
          `more descriptors came through a socket than the ${MAX_DESCRIPTORS} there is room for`,
        );
      }
      target.set(message.memory.subarray(message.data.at, message.data.at + bytes));
      return { bytes, descriptors };
    },
  };
}

/** A signal that came during the call is no reason to give up. */
function uninterrupted(call: () => number): number {
  const interrupted = -errnoNumber('EINTR');
  let result: number;
  do result = call();
  while (result === interrupted);
  return result;
}
