/**
 * libnv's name/value lists as they travel through a socket: a header, then elements back to back, nothing aligned.
 * The types that bhyve's control socket uses, and the other flat ones; lists in lists and arrays are refused.
 * FreeBSD, sys/contrib/libnv/nvlist.c and nvpair.c.
 */
import { bigEndian, littleEndian, u8, u16, u64 } from '../../bytes/record.ts';
import { FsError } from '../../errors.ts';

/** A descriptor that travels beside the list: its place among those, from 0. */
export interface PassedDescriptor {
  readonly descriptor: number;
}

/** null, bool, number, string, binary or descriptor. */
export type NvValue = null | boolean | bigint | string | Uint8Array | PassedDescriptor;
export type Nvlist = ReadonlyMap<string, NvValue>;

/** What an element's type byte says. */
const TYPE = { null: 1, bool: 2, number: 3, string: 4, descriptor: 6, binary: 7 } as const;

const MAGIC = 0x6c;
const VERSION = 0;
/** Names need not be unique; the sender is big endian. Case that is ignored (0x01) makes no difference to reading. */
const FLAG = { ignoreCase: 0x01, repeatedNames: 0x02, bigEndian: 0x80 } as const;
const KNOWN_FLAGS = FLAG.ignoreCase | FLAG.repeatedNames | FLAG.bigEndian;
/** A name's bytes with the NUL. */
const NAME_BYTES_MAX = 2048;

/** `size`: of everything behind this header. `descriptors`: how many follow the list. */
const listFields = { magic: u8, version: u8, flags: u8, descriptors: u64, size: u64 };
/** `nameSize`: with the NUL. `items`: elements of an array, else 0. */
const elementFields = { type: u8, nameSize: u16, dataSize: u64, items: u64 };

const little = {
  list: littleEndian('nvlist_header', 19, listFields),
  element: littleEndian('nvpair_header', 19, elementFields),
};
const big = {
  list: bigEndian('nvlist_header', 19, listFields),
  element: bigEndian('nvpair_header', 19, elementFields),
};

/** Bytes of a list's header, the least that is to be read of one. */
export const HEADER_BYTES = little.list.bytes;

/** Little endian and without flags: bhyve refuses any other. */
export function encodeNvlist(list: Nvlist): Uint8Array {
  const parts: Uint8Array[] = [];
  let descriptors = 0;
  for (const [name, value] of list) {
    const nameBytes = Buffer.from(`${name}\0`);
    if (nameBytes.length > NAME_BYTES_MAX || name.includes('\0')) {
      throw new FsError('EINVAL', `nvlist: no name for an element: '${name}'`);
    }
    const { type, data } = encodeValue(name, value);
    if (type === TYPE.descriptor) descriptors += 1;
    const header = little.element.encode({
      type,
      nameSize: nameBytes.length,
      dataSize: BigInt(data.byteLength),
      items: 0n,
    });
    parts.push(header, nameBytes, data);
  }
  const body = Buffer.concat(parts);
  const header = little.list.encode({
    magic: MAGIC,
    version: VERSION,
    descriptors: BigInt(descriptors),
    size: BigInt(body.length),
  });
  return Buffer.concat([header, body]);
}

function encodeValue(name: string, value: NvValue): { readonly type: number; readonly data: Uint8Array } {
  if (value === null) return { type: TYPE.null, data: new Uint8Array(0) };
  if (typeof value === 'boolean') return { type: TYPE.bool, data: Uint8Array.of(value ? 1 : 0) };
  if (typeof value === 'bigint') return { type: TYPE.number, data: littleWord(value) };
  if (typeof value === 'string') {
    if (value.includes('\0')) throw new FsError('EINVAL', `nvlist: the string '${name}' has a NUL in it`);
    return { type: TYPE.string, data: Buffer.from(`${value}\0`) };
  }
  if (value instanceof Uint8Array) {
    if (value.byteLength === 0) throw new FsError('EINVAL', `nvlist: the binary '${name}' has no bytes`);
    return { type: TYPE.binary, data: value };
  }
  return { type: TYPE.descriptor, data: littleWord(BigInt(value.descriptor)) };
}

function littleWord(value: bigint): Uint8Array {
  const word = new Uint8Array(8);
  new DataView(word.buffer).setBigUint64(0, value, true);
  return word;
}

/**
 * A whole list, as a peer sent it: nothing in it is believed.
 * @throws FsError EIO saying what is wrong with it and where
 */
export function decodeNvlist(bytes: Uint8Array): Map<string, NvValue> {
  if (bytes.byteLength < HEADER_BYTES) {
    throw refused(`${bytes.byteLength} bytes are no list, whose header alone has ${HEADER_BYTES}`);
  }
  const flags = bytes[little.list.at.flags] as number;
  const codec = flags & FLAG.bigEndian ? big : little;
  const header = codec.list.decode(bytes);
  if (header.magic !== MAGIC) throw refused(`it starts with 0x${header.magic.toString(16)}, not 0x6c`);
  if (flags & ~KNOWN_FLAGS) throw refused(`unknown flags 0x${flags.toString(16)}`);
  if (header.size !== BigInt(bytes.byteLength - HEADER_BYTES)) {
    throw refused(`it claims ${header.size} bytes behind the header and has ${bytes.byteLength - HEADER_BYTES}`);
  }

  const list = new Map<string, NvValue>();
  for (let at = HEADER_BYTES; at < bytes.byteLength; ) {
    if (at + codec.element.bytes > bytes.byteLength) throw refused(`the element at byte ${at} is cut off`);
    const { type, nameSize, dataSize, items } = codec.element.decode(bytes, at);
    const nameAt = at + codec.element.bytes;
    const dataAt = nameAt + nameSize;
    if (nameSize < 1 || nameSize > NAME_BYTES_MAX || dataAt > bytes.byteLength) {
      throw refused(`the name of the element at byte ${at} has a size of ${nameSize} bytes`);
    }
    if (bytes.indexOf(0, nameAt) !== dataAt - 1) throw refused(`the name of the element at byte ${at} ends elsewhere`);
    if (dataSize > BigInt(bytes.byteLength - dataAt)) {
      throw refused(`the element at byte ${at} claims ${dataSize} bytes of data`);
    }
    if (items !== 0n) throw refused(`the element at byte ${at} is an array of ${items}`);
    const name = Buffer.from(bytes.subarray(nameAt, dataAt - 1)).toString();
    if (list.has(name) && !(flags & FLAG.repeatedNames)) throw refused(`two elements have the name '${name}'`);
    at = dataAt + Number(dataSize);
    list.set(name, decodeValue(type, bytes.subarray(dataAt, at), codec === little, header.descriptors, name));
  }
  return list;
}

function decodeValue(type: number, data: Uint8Array, isLittle: boolean, descriptors: bigint, name: string): NvValue {
  const word = (): bigint => {
    if (data.byteLength !== 8) throw refused(`'${name}' has ${data.byteLength} bytes, not 8`);
    return new DataView(data.buffer, data.byteOffset, 8).getBigUint64(0, isLittle);
  };
  switch (type) {
    case TYPE.null:
      if (data.byteLength !== 0) throw refused(`'${name}' is null and has ${data.byteLength} bytes`);
      return null;
    case TYPE.bool:
      if (data.byteLength !== 1 || (data[0] as number) > 1) throw refused(`'${name}' is neither true nor false`);
      return data[0] === 1;
    case TYPE.number:
      return word();
    case TYPE.string:
      if (data.byteLength === 0 || data.indexOf(0) !== data.byteLength - 1) {
        throw refused(`the string '${name}' does not end where its data ends`);
      }
      return Buffer.from(data.subarray(0, -1)).toString();
    case TYPE.descriptor: {
      const descriptor = word();
      if (descriptor >= descriptors) throw refused(`'${name}' is descriptor ${descriptor} of ${descriptors}`);
      return { descriptor: Number(descriptor) };
    }
    case TYPE.binary:
      if (data.byteLength === 0) throw refused(`the binary '${name}' has no bytes`);
      return Uint8Array.from(data);
    default:
      throw refused(`'${name}' is of the unknown type ${type}`);
  }
}

const refused = (why: string): FsError => new FsError('EIO', `an nvlist cannot be read: ${why}`);
