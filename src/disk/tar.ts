/** Headers of a tar archive (POSIX.1-1988 ustar), for plain files. */
import { bigEndian, latin1, type RecordOf } from '../bytes/record.ts';

/** Headers, and data after padding, are whole blocks. */
export const TAR_BLOCK_BYTES = 512;
/** An archive ends with two blocks of zeros. */
export const TAR_END_BYTES = 2 * TAR_BLOCK_BYTES;

/** Numbers are octal text. */
const header = bigEndian('ustar header', TAR_BLOCK_BYTES, {
  name: latin1(100),
  mode: latin1(8),
  uid: latin1(8),
  gid: latin1(8),
  size: latin1(12),
  mtime: latin1(12),
  checksum: latin1(8),
  type: latin1(1),
  linkName: latin1(100),
  magic: latin1(6),
  version: latin1(2),
  userName: latin1(32),
  groupName: latin1(32),
  deviceMajor: latin1(8),
  deviceMinor: latin1(8),
  prefix: latin1(155),
  padding: latin1(12),
});

/** From here on a size needs more than 11 octal digits: 8 GiB. */
const OCTAL_SIZE_END = 8 ** 11;

const octal = (value: number, digits: number): string => value.toString(8).padStart(digits, '0');

/** What does not fit in octal is a big-endian number behind a byte 0x80, as GNU tar, bsdtar and Python write and read it. */
function sizeField(bytes: number): string {
  if (bytes < OCTAL_SIZE_END) return octal(bytes, 11);
  const binary = Buffer.alloc(12);
  binary.writeBigUInt64BE(BigInt(bytes), 4);
  binary[0] = 0x80;
  return binary.toString('latin1');
}

/** A header of a regular file that its owner may write. @param name ASCII, at most 100 characters */
export function tarHeader(name: string, bytes: number, modifiedMs: number): Uint8Array {
  const fields: RecordOf<typeof header> = {
    ...header.decode(new Uint8Array(header.bytes)),
    name,
    mode: octal(0o644, 7),
    uid: octal(0, 7),
    gid: octal(0, 7),
    size: sizeField(bytes),
    mtime: octal(Math.floor(modifiedMs / 1000), 11),
    // The sum counts these bytes as blanks.
    checksum: ' '.repeat(8),
    type: '0',
    magic: 'ustar',
    version: '00',
  };
  const sum = header.encode(fields).reduce((total, byte) => total + byte, 0);
  return header.encode({ ...fields, checksum: `${octal(sum, 6)}\0 ` });
}

/** What a file takes behind its header. */
export const tarDataBytes = (bytes: number): number => Math.ceil(bytes / TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES;
