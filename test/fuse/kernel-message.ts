/** Messages as the kernel writes them, byte by byte from fuse_kernel.h: independent of the tables under test. */

export const opcode = {
  LOOKUP: 1,
  FORGET: 2,
  GETATTR: 3,
  SETATTR: 4,
  SYMLINK: 6,
  MKDIR: 9,
  RMDIR: 11,
  RENAME: 12,
  OPEN: 14,
  READ: 15,
  WRITE: 16,
  STATFS: 17,
  RELEASE: 18,
  FSYNC: 20,
  GETXATTR: 22,
  FLUSH: 25,
  INIT: 26,
  OPENDIR: 27,
  READDIR: 28,
  CREATE: 35,
  INTERRUPT: 36,
  BATCH_FORGET: 42,
  FALLOCATE: 43,
  READDIRPLUS: 44,
  RENAME2: 45,
  LSEEK: 46,
} as const;

/** Little-endian integers one after the other: `[value, bytes]`. */
export function integers(...fields: readonly (readonly [number | bigint, 2 | 4 | 8])[]): Buffer {
  return Buffer.concat(
    fields.map(([value, bytes]) => {
      const field = Buffer.alloc(bytes);
      if (bytes === 8) field.writeBigUInt64LE(BigInt.asUintN(64, BigInt(value)));
      else field.writeUIntLE(Number(value), 0, bytes);
      return field;
    }),
  );
}

export const name = (text: string): Buffer => Buffer.from(`${text}\0`);

/** A whole request: the 40-byte header and what follows. */
export function request(
  code: number,
  { unique = 2n, nodeid = 1 }: { unique?: bigint; nodeid?: number },
  ...parts: readonly Uint8Array[]
): Buffer {
  const body = Buffer.concat(parts);
  return Buffer.concat([
    integers(
      [40 + body.length, 4], // len
      [code, 4],
      [unique, 8],
      [nodeid, 8],
      [1000, 4], // uid
      [100, 4], // gid
      [4321, 4], // pid
      [0, 2], // total_extlen
      [0, 2],
    ),
    body,
  ]);
}

/** fuse_read_in: fh, offset, size, read_flags, lock_owner, flags, padding. */
export const readArgument = (fh: number, offset: number | bigint, size: number): Buffer =>
  integers([fh, 8], [offset, 8], [size, 4], [0, 4], [0, 8], [0, 4], [0, 4]);

/** fuse_write_in: fh, offset, size, write_flags, lock_owner, flags, padding. */
export const writeArgument = (fh: number, offset: number | bigint, size: number, flags = 0): Buffer =>
  integers([fh, 8], [offset, 8], [size, 4], [0, 4], [0, 8], [flags, 4], [0, 4]);

/** fuse_release_in: fh, flags, release_flags, lock_owner. */
export const releaseArgument = (fh: number): Buffer => integers([fh, 8], [0, 4], [0, 4], [0, 8]);

/** fuse_out_header of a reply, and its body. */
export function parseReply(reply: Uint8Array): { len: number; error: number; unique: bigint; body: Buffer } {
  const bytes = Buffer.from(reply);
  return {
    len: bytes.readUInt32LE(0),
    error: bytes.readInt32LE(4),
    unique: bytes.readBigUInt64LE(8),
    body: bytes.subarray(16),
  };
}
