/**
 * The structures of fuse_kernel.h, protocol 7.23 and later, by the kernel's field names in camel case. Request bodies
 * follow the 40-byte fuse_in_header, reply bodies the 16-byte fuse_out_header.
 */

import { constants } from 'node:fs';
import { i32, i64, littleEndian, type RecordOf, u16, u32, u64 } from '../bytes/record.ts';

/** Prefix of every request. `len` counts the whole message, this header included. */
export const inHeader = littleEndian('fuse_in_header', 40, {
  len: u32,
  opcode: u32,
  unique: u64, // opaque: echoed in the reply; bit 0 marks an INTERRUPT of the request with that bit clear
  nodeid: u64,
  uid: u32,
  gid: u32,
  pid: u32,
  totalExtlen: u16, // units of 8 bytes; only with flags that are never accepted here
  padding: u16,
});
export type InHeader = RecordOf<typeof inHeader>;

/** Prefix of every reply. `error` is 0 or a negated errno; a notification puts its code there and 0 in `unique`. */
export const outHeader = littleEndian('fuse_out_header', 16, { len: u32, error: i32, unique: u64 });

export const attr = littleEndian('fuse_attr', 88, {
  ino: u64,
  size: u64,
  blocks: u64, // of 512 bytes
  atime: u64,
  mtime: u64,
  ctime: u64,
  atimensec: u32,
  mtimensec: u32,
  ctimensec: u32,
  mode: u32,
  nlink: u32,
  uid: u32,
  gid: u32,
  rdev: u32,
  blksize: u32,
  flags: u32,
});
export type Attr = RecordOf<typeof attr>;

/** The head of fuse_entry_out; a fuse_attr follows. */
export const entryOut = littleEndian('fuse_entry_out without attr', 40, {
  nodeid: u64,
  generation: u64,
  entryValid: u64,
  attrValid: u64,
  entryValidNsec: u32,
  attrValidNsec: u32,
});

/** The head of fuse_attr_out; a fuse_attr follows. */
export const attrOut = littleEndian('fuse_attr_out without attr', 16, {
  attrValid: u64,
  attrValidNsec: u32,
  dummy: u32,
});

export const openOut = littleEndian('fuse_open_out', 16, { fh: u64, openFlags: u32, backingId: u32 });

/** The head of fuse_dirent; the name follows, padded with zeros to 8 bytes. `off` is the cookie of the next entry. */
export const dirent = littleEndian('fuse_dirent without name', 24, { ino: u64, off: u64, namelen: u32, type: u32 });

export const statfsOut = littleEndian('fuse_statfs_out', 80, {
  blocks: u64,
  bfree: u64,
  bavail: u64,
  files: u64,
  ffree: u64,
  bsize: u32,
  namelen: u32,
  frsize: u32,
  padding: u32,
  spare0: u64,
  spare1: u64,
  spare2: u64,
});

export const writeOut = littleEndian('fuse_write_out', 8, { size: u32, padding: u32 });
export const lseekOut = littleEndian('fuse_lseek_out', 8, { offset: u64 });

/** The part of fuse_init_in that every version sends. */
export const initIn = littleEndian('fuse_init_in', 16, { major: u32, minor: u32, maxReadahead: u32, flags: u32 });
/** What 7.36 added behind it; 44 unused bytes follow. */
export const initInExt = littleEndian('fuse_init_in flags2', 4, { flags2: u32 });

export const initOut = littleEndian('fuse_init_out', 64, {
  major: u32,
  minor: u32,
  maxReadahead: u32,
  flags: u32,
  maxBackground: u16,
  congestionThreshold: u16,
  maxWrite: u32,
  timeGran: u32, // nanoseconds
  maxPages: u16,
  mapAlignment: u16,
  flags2: u32,
  maxStackDepth: u32,
  requestTimeout: u16, // seconds
  unused0: u16,
  unused1: u32,
  unused2: u64,
  unused3: u64,
});

export const forgetIn = littleEndian('fuse_forget_in', 8, { nlookup: u64 });
export const batchForgetIn = littleEndian('fuse_batch_forget_in', 8, { count: u32, dummy: u32 });
export const forgetOne = littleEndian('fuse_forget_one', 16, { nodeid: u64, nlookup: u64 });

export const getattrIn = littleEndian('fuse_getattr_in', 16, { getattrFlags: u32, dummy: u32, fh: u64 });

/** What `SetattrIn.valid` says is to change (FATTR_*). */
export const fattr = {
  MODE: 1 << 0,
  UID: 1 << 1,
  GID: 1 << 2,
  SIZE: 1 << 3,
  ATIME: 1 << 4,
  MTIME: 1 << 5,
  ATIME_NOW: 1 << 7,
  MTIME_NOW: 1 << 8,
  CTIME: 1 << 10,
} as const;

export const setattrIn = littleEndian('fuse_setattr_in', 88, {
  valid: u32,
  padding: u32,
  fh: u64,
  size: u64,
  lockOwner: u64,
  atime: u64,
  mtime: u64,
  ctime: u64,
  atimensec: u32,
  mtimensec: u32,
  ctimensec: u32,
  mode: u32,
  unused4: u32,
  uid: u32,
  gid: u32,
  unused5: u32,
});
export type SetattrIn = RecordOf<typeof setattrIn>;

export const mkdirIn = littleEndian('fuse_mkdir_in', 8, { mode: u32, umask: u32 });
export const mknodIn = littleEndian('fuse_mknod_in', 16, { mode: u32, rdev: u32, umask: u32, padding: u32 });
export const renameIn = littleEndian('fuse_rename_in', 8, { newdir: u64 });
export const rename2In = littleEndian('fuse_rename2_in', 16, { newdir: u64, flags: u32, padding: u32 });
export const linkIn = littleEndian('fuse_link_in', 8, { oldnodeid: u64 });
export const openIn = littleEndian('fuse_open_in', 8, { flags: u32, openFlags: u32 });
export const createIn = littleEndian('fuse_create_in', 16, { flags: u32, mode: u32, umask: u32, openFlags: u32 });

/** O_* bits in `WriteIn.flags`. On a direct open no FSYNC follows a write: these are all that tells (Linux 6.18). */
export const SYNC_FLAGS = constants.O_SYNC | constants.O_DSYNC;

/** READ, READDIR and READDIRPLUS; in the latter two `offset` is a cookie. */
export const readIn = littleEndian('fuse_read_in', 40, {
  fh: u64,
  offset: u64,
  size: u32,
  readFlags: u32,
  lockOwner: u64,
  flags: u32, // O_* of the open file
  padding: u32,
});

/** The data follows: at byte 80 of the message. */
export const writeIn = littleEndian('fuse_write_in', 40, {
  fh: u64,
  offset: u64,
  size: u32,
  writeFlags: u32,
  lockOwner: u64,
  flags: u32, // O_* of the open file
  padding: u32,
});

export const releaseIn = littleEndian('fuse_release_in', 24, {
  fh: u64,
  flags: u32,
  releaseFlags: u32,
  lockOwner: u64,
});
export const flushIn = littleEndian('fuse_flush_in', 24, { fh: u64, unused: u32, padding: u32, lockOwner: u64 });
export const fsyncIn = littleEndian('fuse_fsync_in', 16, { fh: u64, fsyncFlags: u32, padding: u32 });
export const interruptIn = littleEndian('fuse_interrupt_in', 8, { unique: u64 });
export const fallocateIn = littleEndian('fuse_fallocate_in', 32, {
  fh: u64,
  offset: u64,
  length: u64,
  mode: u32,
  padding: u32,
});
export const lseekIn = littleEndian('fuse_lseek_in', 24, { fh: u64, offset: u64, whence: u32, padding: u32 });

export const notifyInvalInodeOut = littleEndian('fuse_notify_inval_inode_out', 24, { ino: u64, off: i64, len: i64 });
/** The name follows, and a NUL that `namelen` does not count. */
export const notifyInvalEntryOut = littleEndian('fuse_notify_inval_entry_out', 16, {
  parent: u64,
  namelen: u32,
  flags: u32,
});
