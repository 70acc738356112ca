import type { RecordCodec } from '../bytes/record.ts';
import * as s from './structures.ts';

// biome-ignore lint/suspicious/noExplicitAny: any record fits a row; each row keeps its own type
type AnyRecord = RecordCodec<any>;

export interface Operation {
  readonly opcode: number;
  /** The fixed body after the request header; null: none. */
  readonly arg: AnyRecord | null;
  /** NUL-terminated names after the fixed body. */
  readonly names: 0 | 1 | 2;
  /** `never`: the kernel refuses an answer with ENOENT. */
  readonly reply: 'always' | 'never';
}

/** One row per operation served: all that the decoder and the dispatcher need to know of it. Others get ENOSYS. */
export const operations = {
  LOOKUP: { opcode: 1, arg: null, names: 1, reply: 'always' },
  FORGET: { opcode: 2, arg: s.forgetIn, names: 0, reply: 'never' },
  GETATTR: { opcode: 3, arg: s.getattrIn, names: 0, reply: 'always' },
  SETATTR: { opcode: 4, arg: s.setattrIn, names: 0, reply: 'always' },
  SYMLINK: { opcode: 6, arg: null, names: 2, reply: 'always' },
  MKNOD: { opcode: 8, arg: s.mknodIn, names: 1, reply: 'always' },
  MKDIR: { opcode: 9, arg: s.mkdirIn, names: 1, reply: 'always' },
  UNLINK: { opcode: 10, arg: null, names: 1, reply: 'always' },
  RMDIR: { opcode: 11, arg: null, names: 1, reply: 'always' },
  RENAME: { opcode: 12, arg: s.renameIn, names: 2, reply: 'always' },
  LINK: { opcode: 13, arg: s.linkIn, names: 1, reply: 'always' },
  OPEN: { opcode: 14, arg: s.openIn, names: 0, reply: 'always' },
  READ: { opcode: 15, arg: s.readIn, names: 0, reply: 'always' },
  WRITE: { opcode: 16, arg: s.writeIn, names: 0, reply: 'always' },
  STATFS: { opcode: 17, arg: null, names: 0, reply: 'always' },
  RELEASE: { opcode: 18, arg: s.releaseIn, names: 0, reply: 'always' },
  FSYNC: { opcode: 20, arg: s.fsyncIn, names: 0, reply: 'always' },
  FLUSH: { opcode: 25, arg: s.flushIn, names: 0, reply: 'always' },
  INIT: { opcode: 26, arg: s.initIn, names: 0, reply: 'always' },
  OPENDIR: { opcode: 27, arg: s.openIn, names: 0, reply: 'always' },
  READDIR: { opcode: 28, arg: s.readIn, names: 0, reply: 'always' },
  RELEASEDIR: { opcode: 29, arg: s.releaseIn, names: 0, reply: 'always' },
  FSYNCDIR: { opcode: 30, arg: s.fsyncIn, names: 0, reply: 'always' },
  CREATE: { opcode: 35, arg: s.createIn, names: 1, reply: 'always' },
  INTERRUPT: { opcode: 36, arg: s.interruptIn, names: 0, reply: 'never' },
  DESTROY: { opcode: 38, arg: null, names: 0, reply: 'always' },
  NOTIFY_REPLY: { opcode: 41, arg: null, names: 0, reply: 'never' },
  BATCH_FORGET: { opcode: 42, arg: s.batchForgetIn, names: 0, reply: 'never' },
  FALLOCATE: { opcode: 43, arg: s.fallocateIn, names: 0, reply: 'always' },
  READDIRPLUS: { opcode: 44, arg: s.readIn, names: 0, reply: 'always' },
  RENAME2: { opcode: 45, arg: s.rename2In, names: 2, reply: 'always' },
  LSEEK: { opcode: 46, arg: s.lseekIn, names: 0, reply: 'always' },
} as const satisfies Record<string, Operation>;

export type OperationName = keyof typeof operations;

const byOpcode = new Map<number, OperationName>();
for (const [name, { opcode }] of Object.entries(operations)) {
  if (byOpcode.has(opcode)) throw new Error(`opcode ${opcode} stands twice in the table of operations`);
  byOpcode.set(opcode, name as OperationName);
}

export const operationOf = (opcode: number): OperationName | undefined => byOpcode.get(opcode);
