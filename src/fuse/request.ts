import type { RecordOf } from '../bytes/record.ts';
import { FsError } from '../errors.ts';
import { type OperationName, operationOf, operations } from './operations.ts';
import { type InHeader, inHeader } from './structures.ts';

type ArgOf<N extends OperationName> = (typeof operations)[N]['arg'] extends null
  ? null
  : RecordOf<(typeof operations)[N]['arg']>;

/** A decoded message of the kernel. */
export type Request = { [N in OperationName]: RequestOf<N> }[OperationName];

export interface RequestOf<N extends OperationName> {
  readonly name: N;
  readonly header: InHeader;
  readonly arg: ArgOf<N>;
  readonly names: readonly string[];
  /** What follows the fixed body and the names: the data of WRITE, the records of BATCH_FORGET. */
  readonly rest: Uint8Array;
}

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** Bytes of a name that a directory entry may have (NAME_MAX). */
export const NAME_BYTES_MAX = 255;

/** @throws FsError EIO if the message is shorter than a header, or not as long as its header says */
export function decodeHeader(message: Uint8Array): InHeader {
  if (message.length < inHeader.bytes) {
    throw new FsError('EIO', `FUSE request of ${message.length} bytes: a header alone has ${inHeader.bytes}`);
  }
  const header = inHeader.decode(message);
  if (header.len !== message.length) {
    throw new FsError('EIO', `FUSE request of ${message.length} bytes says that it has ${header.len}`);
  }
  return header;
}

/**
 * Decode a message whose header is known.
 * @throws FsError ENOSYS for an operation that is not served, EIO if the body is too short,
 *   ENAMETOOLONG and EINVAL for a name that no entry can have
 */
export function decodeRequest(header: InHeader, message: Uint8Array): Request {
  const name = operationOf(header.opcode);
  if (name === undefined) throw new FsError('ENOSYS', `FUSE operation ${header.opcode} is not served`);
  const { arg, names: nameCount } = operations[name];
  let at = inHeader.bytes + (arg?.bytes ?? 0);
  if (message.length < at) {
    throw new FsError('EIO', `FUSE ${name} request of ${message.length} bytes: at least ${at} are needed`);
  }
  const names: string[] = [];
  for (let i = 0; i < nameCount; i++) {
    const end = message.indexOf(0, at);
    if (end < 0) throw new FsError('EIO', `FUSE ${name} request with ${nameCount} names: name ${i + 1} has no end`);
    names.push(decodeName(message.subarray(at, end)));
    at = end + 1;
  }
  const decoded = arg === null ? null : arg.decode(message, inHeader.bytes);
  return { name, header, arg: decoded, names, rest: message.subarray(at) } as Request;
}

function decodeName(bytes: Uint8Array): string {
  if (bytes.length > NAME_BYTES_MAX) {
    throw new FsError('ENAMETOOLONG', `a name of ${bytes.length} bytes is longer than ${NAME_BYTES_MAX}`);
  }
  try {
    return utf8.decode(bytes);
  } catch (cause) {
    throw new FsError('EINVAL', `the name ${Buffer.from(bytes).toString('latin1')} is not UTF-8`, { cause });
  }
}
