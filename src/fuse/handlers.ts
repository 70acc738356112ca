/** What each operation means to the tree: one short function per row of the table of operations. */

import { FsError } from '../errors.ts';
import { DirectoryStream, type ListedEntry } from './directory-stream.ts';
import type { AttributeChange, Caller, DirectoryNode, FileSystem, Node, OpenFile } from './filesystem.ts';
import type { HandleTable } from './handle-table.ts';
import type { NodeTable } from './node-table.ts';
import type { OperationName } from './operations.ts';
import {
  encodeAttr,
  encodeCreate,
  encodeEntry,
  encodeLseek,
  encodeOpen,
  encodeStatfs,
  encodeWrite,
  NOTHING,
  openFlags,
} from './reply.ts';
import type { RequestOf } from './request.ts';
import { fattr, forgetOne, type SetattrIn, SYNC_FLAGS } from './structures.ts';

/** A successful answer. */
export interface Reply {
  readonly body: Uint8Array;
  readonly arrived?: () => void;
  /** Takes back what the kernel would have owned by this answer (a lookup, an open file), if it never arrived. */
  readonly lost?: () => void | Promise<void>;
}

type Handler<N extends OperationName> = (request: RequestOf<N>, caller: Caller) => Reply | Promise<Reply>;

/** The operations that concern the tree; the session itself deals with the others. */
export type TreeOperation = Exclude<OperationName, 'INIT' | 'INTERRUPT' | 'NOTIFY_REPLY'>;
export type Handlers = { readonly [N in TreeOperation]: Handler<N> };

const RENAME_NOREPLACE = 1;
/** Of st_mode. */
const PERMISSIONS = 0o7777;

const done: Reply = { body: NOTHING };

/** One offset or length: exact up to 2^53, and above that beyond the end of any file. */
const position = (value: bigint): number => Number(value);

export function makeHandlers(fileSystem: FileSystem, nodes: NodeTable, handles: HandleTable): Handlers {
  /** ENTRY for `node`, which from now on is known to the kernel. */
  const entry = async (node: Node): Promise<Reply> => {
    const body = encodeEntry(node, await node.attributes());
    nodes.remember(node);
    return { body, lost: () => nodes.forget(BigInt(node.ino), 1n) };
  };

  /** OPEN_OUT for `open`, which from now on is the kernel's to release. */
  const opened = async (open: OpenFile): Promise<Reply> => {
    let fh: number;
    try {
      fh = handles.addFile(open);
    } catch (error) {
      await open.release();
      throw error;
    }
    const lost = (): Promise<void> => handles.removeFile(BigInt(fh)).release();
    return { body: encodeOpen(fh, openFlags(open.caching)), lost };
  };

  const readDirectory = async (request: RequestOf<'READDIR' | 'READDIRPLUS'>, plus: boolean): Promise<Reply> => {
    const directory = nodes.directory(request.header.nodeid);
    const handle = handles.directory(request.arg.fh);
    const start = position(request.arg.offset);
    if (start === 0) handle.listing = await listingOf(directory);
    const stream = new DirectoryStream(request.arg.size);
    const told: Node[] = [];
    for (let index = start; index < handle.listing.length; index++) {
      const listed = handle.listing[index] as ListedEntry;
      if (!stream.fits(listed, plus)) break;
      if (!plus) {
        stream.add(listed, index + 1);
        continue;
      }
      const known = index < DOTS ? undefined : await describe(directory, listed);
      stream.addPlus(listed, index + 1, known);
      if (known === undefined) continue;
      nodes.remember(known.node);
      told.push(known.node);
    }
    return {
      body: stream.bytes(),
      lost: () => {
        for (const node of told) nodes.forget(BigInt(node.ino), 1n);
      },
    };
  };

  const rename = async (
    request: RequestOf<'RENAME' | 'RENAME2'>,
    noReplace: boolean,
    caller: Caller,
  ): Promise<Reply> => {
    const target = nodes.directory(request.arg.newdir);
    const [from, to] = request.names as [string, string];
    await nodes.directory(request.header.nodeid).rename(from, target, to, noReplace, caller);
    return done;
  };

  const notHere = (what: string) => (): never => {
    throw new FsError('EPERM', `${what} cannot be made in this tree`);
  };

  return {
    LOOKUP: async ({ header, names }) => entry(await nodes.directory(header.nodeid).lookup(names[0] as string)),

    FORGET: ({ header, arg }) => {
      nodes.forget(header.nodeid, arg.nlookup);
      return done;
    },

    BATCH_FORGET: ({ arg, rest }) => {
      const count = Math.min(arg.count, Math.floor(rest.length / forgetOne.bytes));
      for (let i = 0; i < count; i++) {
        const { nodeid, nlookup } = forgetOne.decode(rest, i * forgetOne.bytes);
        nodes.forget(nodeid, nlookup);
      }
      return done;
    },

    GETATTR: async ({ header }) => {
      const node = nodes.node(header.nodeid);
      return { body: encodeAttr(node, await node.attributes()) };
    },

    SETATTR: async ({ header, arg }, caller) => {
      const node = nodes.node(header.nodeid);
      const change = changeOf(arg);
      if (Object.keys(change).length > 0) await node.setAttributes(change, caller);
      return { body: encodeAttr(node, await node.attributes()) };
    },

    MKDIR: async ({ header, names }, caller) =>
      entry(await nodes.directory(header.nodeid).makeDirectory(names[0] as string, caller)),

    RMDIR: async ({ header, names }, caller) => {
      await nodes.directory(header.nodeid).removeDirectory(names[0] as string, caller);
      return done;
    },

    UNLINK: async ({ header, names }, caller) => {
      await nodes.directory(header.nodeid).unlink(names[0] as string, caller);
      return done;
    },

    RENAME: (request, caller) => rename(request, false, caller),

    RENAME2: (request, caller) => {
      if ((request.arg.flags & ~RENAME_NOREPLACE) !== 0) {
        throw new FsError('EINVAL', 'two names cannot be exchanged in this tree: rename them one after the other');
      }
      return rename(request, request.arg.flags === RENAME_NOREPLACE, caller);
    },

    SYMLINK: notHere('a symbolic link'),
    LINK: notHere('a hard link'),
    MKNOD: notHere('a special file'),

    CREATE: async ({ header, arg, names }, caller) => {
      const directory = nodes.directory(header.nodeid);
      const { node, open } = await directory.createFile(names[0] as string, arg.flags, arg.mode & PERMISSIONS, caller);
      const file = await opened(open);
      try {
        const made = await entry(node);
        return {
          body: encodeCreate(made.body, file.body),
          lost: async () => {
            made.lost?.();
            await file.lost?.();
          },
        };
      } catch (error) {
        await file.lost?.();
        throw error;
      }
    },

    OPEN: async ({ header, arg }, caller) => opened(await nodes.file(header.nodeid).open(arg.flags, caller)),

    READ: async ({ arg }, caller) => {
      const bytes = await handles.file(arg.fh).read(position(arg.offset), arg.size, caller);
      return { body: bytes.length > arg.size ? bytes.subarray(0, arg.size) : bytes };
    },

    WRITE: async ({ arg, rest }, caller) => {
      if (rest.length !== arg.size) {
        throw new FsError('EINVAL', `FUSE WRITE of ${arg.size} bytes carries ${rest.length}`);
      }
      const sync = (arg.flags & SYNC_FLAGS) !== 0;
      const count = await handles.file(arg.fh).write(position(arg.offset), rest, sync, caller);
      return { body: encodeWrite(Math.min(count, arg.size)) };
    },

    LSEEK: async ({ arg }) => ({
      body: encodeLseek(await handles.file(arg.fh).seek(position(arg.offset), arg.whence)),
    }),

    FALLOCATE: async ({ arg }) => {
      await handles.file(arg.fh).allocate(position(arg.offset), position(arg.length), arg.mode);
      return done;
    },

    FLUSH: async ({ arg }) => {
      await handles.file(arg.fh).flush();
      return done;
    },

    FSYNC: async ({ arg }) => {
      await handles.file(arg.fh).sync();
      return done;
    },

    RELEASE: async ({ arg }) => {
      await handles.removeFile(arg.fh).release();
      return done;
    },

    STATFS: async () => ({ body: encodeStatfs(await fileSystem.status()) }),

    OPENDIR: ({ header }) => {
      nodes.directory(header.nodeid);
      const fh = handles.addDirectory();
      return { body: encodeOpen(fh, 0), lost: () => handles.removeDirectory(BigInt(fh)) };
    },

    READDIR: (request) => readDirectory(request, false),
    READDIRPLUS: (request) => readDirectory(request, true),

    RELEASEDIR: ({ arg }) => {
      handles.removeDirectory(arg.fh);
      return done;
    },

    // What makes or removes an entry is durable when it is answered.
    FSYNCDIR: () => done,
    DESTROY: () => done,
  };
}

/** `.` and `..`, which carry no attributes in READDIRPLUS: they count as no lookup. */
const DOTS = 2;

async function listingOf(directory: DirectoryNode): Promise<ListedEntry[]> {
  const listing: ListedEntry[] = [
    { name: '.', ino: directory.ino, kind: 'directory' },
    { name: '..', ino: directory.parentIno, kind: 'directory' },
  ];
  for (const { name, node } of await directory.list()) listing.push({ name, ino: node.ino, kind: node.kind });
  return listing;
}

/**
 * The node now under a listed name; undefined if the name no longer leads to it. The listing may be older than a
 * rename, and READDIRPLUS puts what it says into the kernel's cache of names.
 */
async function describe(directory: DirectoryNode, listed: ListedEntry) {
  try {
    const node = await directory.lookup(listed.name);
    return node.ino === listed.ino ? { node, attributes: await node.attributes() } : undefined;
  } catch (error) {
    // Gone meanwhile: whoever asks for it by name is told why.
    if (error instanceof FsError) return undefined;
    throw error;
  }
}

/** @throws FsError EFBIG for a size that no number holds exactly */
function changeOf(arg: SetattrIn): AttributeChange {
  const { valid } = arg;
  if (valid & fattr.SIZE && arg.size > Number.MAX_SAFE_INTEGER) {
    throw new FsError('EFBIG', `a file of ${arg.size} bytes is too large`);
  }
  const times = fattr.ATIME | fattr.MTIME | fattr.CTIME | fattr.ATIME_NOW | fattr.MTIME_NOW;
  return {
    ...(valid & fattr.SIZE && { size: Number(arg.size) }),
    ...(valid & fattr.MODE && { mode: arg.mode }),
    ...(valid & fattr.UID && { uid: arg.uid }),
    ...(valid & fattr.GID && { gid: arg.gid }),
    ...(valid & times && { times: true }),
  };
}
