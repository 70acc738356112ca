import { constants } from 'node:os';
import { describe, expect, it, vi } from 'vitest';
import { Session } from '../../src/fuse/session.ts';
import {
  integers,
  name,
  opcode,
  parseReply,
  readArgument,
  releaseArgument,
  request,
  writeArgument,
} from './kernel-message.ts';
import { makeMemoryDisk } from './memory-disk.ts';
import { MemoryFile, MemoryFileSystem } from './memory-file-system.ts';

const { ENOENT, ENOSYS, EIO, EINTR, EBADF, EPERM, EINVAL, ENOTDIR, ESTALE } = constants.errno;

interface Answer {
  readonly error: number;
  readonly body: Buffer;
}

/** A session on a device that keeps what is written to it; `gone` uniques are nobody's any more. */
function start() {
  const fileSystem = new MemoryFileSystem(makeMemoryDisk(), undefined);
  const replies: { len: number; error: number; unique: bigint; body: Buffer }[] = [];
  const reported: string[] = [];
  const gone = new Set<bigint>();
  const waiting = new Map<bigint, (answer: Answer) => void>();
  const session = new Session({
    fileSystem,
    system: 'linux',
    send: (header, body) => {
      const reply = parseReply(Buffer.concat([header, body]));
      if (gone.has(reply.unique)) return false;
      replies.push(reply);
      waiting.get(reply.unique)?.(reply);
      return true;
    },
    report: (error, operation) => reported.push(`${operation}: ${error}`),
  });
  let unique = 0n;
  /** Send a request and wait for its one answer. */
  const ask = (code: number, nodeid: number, ...parts: Uint8Array[]): Promise<Answer> =>
    new Promise((resolve) => {
      unique += 2n;
      waiting.set(unique, resolve);
      session.receive(request(code, { unique, nodeid }, ...parts));
    });
  const lookup = async (parent: number, text: string): Promise<number> =>
    Number((await ask(opcode.LOOKUP, parent, name(text))).body.readBigUInt64LE(0));
  const open = async (nodeid: number): Promise<number> =>
    Number((await ask(opcode.OPEN, nodeid, integers([2, 4], [0, 4]))).body.readBigUInt64LE(0));
  return { fileSystem, session, replies, reported, gone, ask, lookup, open };
}

describe('a session', () => {
  it('is initialised once INIT was answered', async () => {
    const { ask, session } = start();
    const init = await ask(opcode.INIT, 0, integers([7, 4], [45, 4], [131072, 4], [0, 4], [0, 4]), Buffer.alloc(44));
    expect(init.error).toBe(0);
    expect(init.body).toHaveLength(64);
    await session.initialised;
  });

  it('is refused by a kernel that is too old', async () => {
    const { ask, session } = start();
    const init = await ask(opcode.INIT, 0, integers([7, 4], [8, 4], [131072, 4], [0, 4]));
    expect(init.error).toBeLessThan(0);
    await expect(session.initialised).rejects.toThrow('7.8');
  });

  it('answers an unknown operation with ENOSYS', async () => {
    const { ask } = start();
    expect(await ask(opcode.GETXATTR, 1, integers([0, 4], [0, 4]), name('user.x'))).toMatchObject({ error: -ENOSYS });
    expect(await ask(9999, 1)).toMatchObject({ error: -ENOSYS });
  });

  it('answers each failure with its errno and no body', async () => {
    const { ask, lookup } = start();
    const file = await lookup(1, 'hello.txt');
    const cases: [Promise<Answer>, number][] = [
      [ask(opcode.LOOKUP, 1, name('absent')), ENOENT],
      [ask(opcode.LOOKUP, file, name('below')), ENOTDIR],
      [ask(opcode.GETATTR, 4711, integers([0, 4], [0, 4], [0, 8])), ESTALE],
      [ask(opcode.READ, file, readArgument(5000, 0, 10)), EBADF],
      [ask(opcode.SYMLINK, 1, name('link'), name('target')), EPERM],
      [ask(opcode.RENAME2, 1, integers([1, 8], [2, 4], [0, 4]), name('hello.txt'), name('kept.txt')), EINVAL],
    ];
    for (const [answer, errno] of cases) expect(await answer).toMatchObject({ error: -errno, body: Buffer.alloc(0) });
  });

  it('answers a bug with EIO, and reports it', async () => {
    const { ask, fileSystem, reported } = start();
    fileSystem.status = () => Promise.reject(new TypeError('our bug'));
    expect(await ask(opcode.STATFS, 1)).toMatchObject({ error: -EIO });
    expect(reported).toEqual(['STATFS: TypeError: our bug']);
  });

  it('never answers FORGET, BATCH_FORGET and INTERRUPT', async () => {
    const { ask, session, replies } = start();
    session.receive(request(opcode.FORGET, { unique: 1000n, nodeid: 2 }, integers([1, 8])));
    session.receive(request(opcode.BATCH_FORGET, { unique: 1002n }, integers([1, 4], [0, 4], [2, 8], [1, 8])));
    session.receive(request(opcode.INTERRUPT, { unique: 1005n }, integers([1004, 8])));
    await ask(opcode.STATFS, 1);
    await session.close();
    expect(replies).toHaveLength(1);
  });

  it('reads and writes an open file, and releases it', async () => {
    const { ask, lookup, open, fileSystem } = start();
    const file = await lookup(1, 'hello.txt');
    const fh = await open(file);
    expect(fh).toBe(4096);
    expect((await ask(opcode.READ, file, readArgument(fh, 1, 100))).body.toString()).toBe('ello\n');
    expect((await ask(opcode.WRITE, file, writeArgument(fh, 5, 3), Buffer.from('abc'))).body.readUInt32LE(0)).toBe(3);
    expect((await ask(opcode.READ, file, readArgument(fh, 0, 100))).body.toString()).toBe('helloabc');
    expect(fileSystem.openFiles).toBe(1);
    await ask(opcode.RELEASE, file, releaseArgument(fh));
    expect(fileSystem.openFiles).toBe(0);
    expect(await ask(opcode.READ, file, readArgument(fh, 0, 1))).toMatchObject({ error: -EBADF });
  });

  it('refuses a WRITE whose size is not that of its data', async () => {
    const { ask, lookup, open } = start();
    const file = await lookup(1, 'hello.txt');
    const fh = await open(file);
    expect(await ask(opcode.WRITE, file, writeArgument(fh, 0, 4), Buffer.from('abc'))).toMatchObject({
      error: -EINVAL,
    });
  });

  it('SETATTR changes only what is valid', async () => {
    const { ask, lookup, fileSystem } = start();
    const file = await lookup(1, 'hello.txt');
    const body = Buffer.alloc(88);
    body.writeUInt32LE(8, 0); // SIZE
    body.writeBigUInt64LE(2n, 16);
    body.writeUInt32LE(0o777, 68);
    const answer = await ask(opcode.SETATTR, file, body);
    expect(answer.body.readBigUInt64LE(16 + 8)).toBe(2n);
    expect(answer.body.readUInt32LE(16 + 60)).toBe(0o100644);
    expect((fileSystem.root.entries.get('hello.txt') as MemoryFile).contents.toString()).toBe('he');
  });

  it('lists a directory as it was at its rewind, whatever happens meanwhile', async () => {
    const { ask, fileSystem } = start();
    const fh = Number((await ask(opcode.OPENDIR, 1, integers([0, 4], [0, 4]))).body.readBigUInt64LE(0));
    const first = await ask(opcode.READDIR, 1, readArgument(fh, 0, 3 * 32));
    expect(namesIn(first.body)).toEqual(['.', '..', 'disk.raw']);
    fileSystem.root.entries.delete('disk.raw');
    const cookie = lastCookie(first.body);
    const second = await ask(opcode.READDIR, 1, readArgument(fh, cookie, 4096));
    expect(namesIn(second.body)).toEqual(['hello.txt', 'kept.txt', 'slow', 'many']);
    expect((await ask(opcode.READDIR, 1, readArgument(fh, 7, 4096))).body).toHaveLength(0);
    const rewound = await ask(opcode.READDIR, 1, readArgument(fh, 0, 4096));
    expect(namesIn(rewound.body)).toEqual(['.', '..', 'hello.txt', 'kept.txt', 'slow', 'many']);
  });

  it('READDIRPLUS tells no attributes of `.` and `..`', async () => {
    const { ask } = start();
    const fh = Number((await ask(opcode.OPENDIR, 1, integers([0, 4], [0, 4]))).body.readBigUInt64LE(0));
    const { body } = await ask(opcode.READDIRPLUS, 1, readArgument(fh, 0, 2 * 160));
    expect(plusIn(body)).toEqual([
      ['.', 0],
      ['..', 0],
    ]);
  });

  it('READDIRPLUS tells no attributes of a name that is gone or leads elsewhere since the rewind', async () => {
    const { ask, fileSystem } = start();
    const fh = Number((await ask(opcode.OPENDIR, 1, integers([0, 4], [0, 4]))).body.readBigUInt64LE(0));
    await ask(opcode.READDIR, 1, readArgument(fh, 0, 4096));
    fileSystem.root.entries.delete('disk.raw');
    fileSystem.root.add('kept.txt', new MemoryFile(fileSystem, Buffer.alloc(0), 'fresh'));
    const { ino } = fileSystem.root.entries.get('hello.txt')!;
    const { body } = await ask(opcode.READDIRPLUS, 1, readArgument(fh, 2, 65536));
    expect(plusIn(body).slice(0, 3)).toEqual([
      ['disk.raw', 0],
      ['hello.txt', ino],
      ['kept.txt', 0],
    ]);
    expect(await ask(opcode.GETATTR, ino, integers([0, 4], [0, 4], [0, 8]))).toMatchObject({ error: 0 });
  });

  it('an interrupted request is answered by whoever honours it, with EINTR', async () => {
    const { session, replies, lookup } = start();
    const slow = await lookup(1, 'slow');
    session.receive(request(opcode.MKDIR, { unique: 500n, nodeid: slow }, integers([0o755, 4], [0, 4]), name('x')));
    session.receive(request(opcode.INTERRUPT, { unique: 501n }, integers([500, 8])));
    await vi.waitFor(() => expect(replies.find(({ unique }) => unique === 500n)).toMatchObject({ error: -EINTR }));
  });

  it('an INTERRUPT that overtook its request counts', async () => {
    const { session, replies, lookup } = start();
    const slow = await lookup(1, 'slow');
    session.receive(request(opcode.INTERRUPT, { unique: 601n }, integers([600, 8])));
    session.receive(request(opcode.MKDIR, { unique: 600n, nodeid: slow }, integers([0o755, 4], [0, 4]), name('x')));
    await vi.waitFor(() => expect(replies.find(({ unique }) => unique === 600n)).toMatchObject({ error: -EINTR }));
  });

  it('a file whose OPEN nobody waits for any more is released', async () => {
    const { session, gone, lookup, fileSystem } = start();
    const file = await lookup(1, 'hello.txt');
    gone.add(700n);
    session.receive(request(opcode.OPEN, { unique: 700n, nodeid: file }, integers([0, 4], [0, 4])));
    await session.close();
    expect(fileSystem.openFiles).toBe(0);
  });

  it('a LOOKUP that never arrived is not counted', async () => {
    const { session, gone, ask, fileSystem } = start();
    const { ino } = fileSystem.root.entries.get('hello.txt')!;
    gone.add(800n);
    session.receive(request(opcode.LOOKUP, { unique: 800n }, name('hello.txt')));
    await session.close();
    expect(await ask(opcode.GETATTR, ino, integers([0, 4], [0, 4], [0, 8]))).toMatchObject({ error: -ESTALE });
  });

  it('at its end interrupts what runs, and releases what is open', async () => {
    const { session, replies, lookup, open, fileSystem } = start();
    await open(await lookup(1, 'hello.txt'));
    await open(await lookup(1, 'disk.raw'));
    const slow = await lookup(1, 'slow');
    session.receive(request(opcode.MKDIR, { unique: 900n, nodeid: slow }, integers([0o755, 4], [0, 4]), name('x')));
    await session.close();
    expect(fileSystem.openFiles).toBe(0);
    expect(replies.filter(({ unique }) => unique === 900n)).toHaveLength(1);
  });

  it('reports a message that is none, and lives on', async () => {
    const { session, ask, reported } = start();
    session.receive(Buffer.alloc(7));
    expect(reported).toHaveLength(1);
    expect(await ask(opcode.STATFS, 1)).toMatchObject({ error: 0 });
  });
});

/** The names in dirents. */
function namesIn(body: Buffer): string[] {
  const names: string[] = [];
  for (let at = 0; at < body.length; ) {
    const length = body.readUInt32LE(at + 16);
    names.push(body.toString('utf8', at + 24, at + 24 + length));
    at += Math.ceil((24 + length) / 8) * 8;
  }
  return names;
}

/** Names and nodeids in direntplus records. */
function plusIn(body: Buffer): [string, number][] {
  const entries: [string, number][] = [];
  for (let at = 0; at < body.length; ) {
    const length = body.readUInt32LE(at + 144);
    entries.push([body.toString('utf8', at + 152, at + 152 + length), Number(body.readBigUInt64LE(at))]);
    at += Math.ceil((152 + length) / 8) * 8;
  }
  return entries;
}

const lastCookie = (body: Buffer): number => {
  let cookie = 0n;
  for (let at = 0; at < body.length; ) {
    cookie = body.readBigUInt64LE(at + 8);
    at += Math.ceil((24 + body.readUInt32LE(at + 16)) / 8) * 8;
  }
  return Number(cookie);
};
