import { closeSync, constants, readSync, writeSync } from 'node:fs';
import { constants as system } from 'node:os';
import { describe, expect, it } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { type DataPlane, DEFER } from '../../src/fuse/data-plane.ts';
import { serveDevice } from '../../src/fuse/data-thread.ts';
import { systemCalls } from '../../src/os/system-calls.ts';
import { integers, name, opcode, parseReply, readArgument, request, writeArgument } from './kernel-message.ts';

const { EIO, ENXIO, ENOSPC, EINVAL } = system.errno;

/** Calls of the plane, as words. */
function recorder(overrides: Partial<DataPlane> = {}): { plane: DataPlane; calls: string[] } {
  const calls: string[] = [];
  const plane: DataPlane = {
    read(fh, offset, size, reply, at) {
      calls.push(`read ${fh} ${offset} ${size}`);
      Buffer.from(reply.buffer).write('bytes', at);
      return Math.min(size, 5);
    },
    write(fh, offset, size, data, at, sync) {
      calls.push(`write ${fh} ${offset} ${Buffer.from(data.subarray(at, at + size))}${sync ? ' sync' : ''}`);
      return size;
    },
    seek(fh, offset, whence) {
      calls.push(`seek ${fh} ${offset} ${whence}`);
      return offset + 2 ** 33;
    },
    allocate(fh, offset, length, mode) {
      calls.push(`allocate ${fh} ${offset} ${length} ${mode}`);
      return 0;
    },
    flush(fh) {
      calls.push(`flush ${fh}`);
      return 0;
    },
    sync(fh) {
      calls.push(`sync ${fh}`);
      return 0;
    },
    tidy() {},
    ...overrides,
  };
  return { plane, calls };
}

/** Serve these requests from a socket that keeps message boundaries, as the device does; the replies in order. */
function serve(plane: DataPlane, ...requests: readonly Uint8Array[]) {
  const [kernel, device] = systemCalls().socketPair('seqpacket');
  try {
    for (const message of requests) writeSync(kernel, message);
    writeSync(kernel, new Uint8Array(0)); // reads as the end
    serveDevice({ fd: device, requestBytes: 65536, pollMicroseconds: 0, polled: new SharedArrayBuffer(4) }, plane);
    closeSync(device);
    const replies: ReturnType<typeof parseReply>[] = [];
    const buffer = Buffer.alloc(70_000);
    for (;;) {
      const bytes = readSync(kernel, buffer);
      if (bytes === 0) return replies;
      replies.push(parseReply(Uint8Array.prototype.slice.call(buffer, 0, bytes)));
    }
  } finally {
    closeSync(kernel);
  }
}

describe('a data thread', () => {
  it('has the plane tidy up behind each answer, not behind what it passed on', () => {
    const events: string[] = [];
    const { plane } = recorder({
      read: () => {
        events.push('read');
        return 0;
      },
      write: () => {
        events.push('write');
        return DEFER;
      },
      tidy: () => events.push('tidy'),
    });
    serve(
      plane,
      request(opcode.READ, {}, readArgument(3, 0, 4096)),
      request(opcode.WRITE, {}, writeArgument(3, 0, 0)),
      request(opcode.READ, {}, readArgument(3, 0, 4096)),
    );
    expect(events).toEqual(['read', 'tidy', 'write', 'read', 'tidy']);
  });

  it('READ: answers with the bytes that the plane put behind the header', () => {
    const { plane, calls } = recorder();
    const [reply] = serve(
      plane,
      request(opcode.READ, { unique: 0x1234_5678_9abc_def0n }, readArgument(3, 2 ** 33 + 1, 4096)),
    );
    expect(calls).toEqual([`read 3 ${2 ** 33 + 1} 4096`]);
    expect(reply).toEqual({ len: 21, error: 0, unique: 0x1234_5678_9abc_def0n, body: Buffer.from('bytes') });
  });

  it('WRITE: gives the plane the data, and says if it must be durable', () => {
    const { plane, calls } = recorder();
    const replies = serve(
      plane,
      request(opcode.WRITE, { unique: 2n }, writeArgument(1, 4096, 5, constants.O_WRONLY), Buffer.from('hello')),
      request(opcode.WRITE, { unique: 4n }, writeArgument(1, 0, 1, constants.O_SYNC), Buffer.from('x')),
      request(opcode.WRITE, { unique: 6n }, writeArgument(1, 1, 1, constants.O_DSYNC), Buffer.from('y')),
    );
    expect(calls).toEqual(['write 1 4096 hello', 'write 1 0 x sync', 'write 1 1 y sync']);
    expect(replies[0]).toEqual({ len: 24, error: 0, unique: 2n, body: integers([5, 4], [0, 4]) });
  });

  it('LSEEK: answers with an offset of 64 bits', () => {
    const { plane, calls } = recorder();
    const [reply] = serve(plane, request(opcode.LSEEK, {}, integers([2, 8], [4096, 8], [3, 4], [0, 4])));
    expect(calls).toEqual(['seek 2 4096 3']);
    expect(reply).toMatchObject({ len: 24, body: integers([2 ** 33 + 4096, 8]) });
  });

  it('FALLOCATE, FLUSH, FSYNC: answers without a body', () => {
    const { plane, calls } = recorder();
    const replies = serve(
      plane,
      request(opcode.FALLOCATE, {}, integers([2, 8], [512, 8], [2 ** 32, 8], [3, 4], [0, 4])),
      request(opcode.FLUSH, {}, integers([2, 8], [0, 8], [0, 8])),
      request(opcode.FSYNC, {}, integers([2, 8], [1, 4], [0, 4])),
    );
    expect(calls).toEqual(['allocate 2 512 4294967296 3', 'flush 2', 'sync 2']);
    expect(replies.map(({ len, error }) => [len, error])).toEqual([
      [16, 0],
      [16, 0],
      [16, 0],
    ]);
  });

  it('a negated errno of the plane is the answer, without a body', () => {
    const { plane } = recorder({ seek: () => -ENXIO, read: () => -EIO });
    const replies = serve(
      plane,
      request(opcode.LSEEK, {}, integers([2, 8], [0, 8], [3, 4], [0, 4])),
      request(opcode.READ, {}, readArgument(2, 0, 512)),
    );
    expect(replies.map(({ len, error }) => [len, error])).toEqual([
      [16, -ENXIO],
      [16, -EIO],
    ]);
  });

  it('an FsError is answered with its errno, anything else with EIO, and the thread goes on', () => {
    const { plane } = recorder({
      write: () => {
        throw new FsError('ENOSPC', 'full');
      },
      read: () => {
        throw new TypeError('a bug');
      },
    });
    const replies = serve(
      plane,
      request(opcode.WRITE, {}, writeArgument(1, 0, 1), Buffer.from('x')),
      request(opcode.READ, {}, readArgument(1, 0, 1)),
      request(opcode.FLUSH, {}, integers([2, 8], [0, 8], [0, 8])),
    );
    expect(replies.map(({ error }) => error)).toEqual([-ENOSPC, -EIO, 0]);
  });

  it('a WRITE whose size is not that of its data is EINVAL, unseen by the plane', () => {
    const { plane, calls } = recorder();
    const [reply] = serve(plane, request(opcode.WRITE, {}, writeArgument(1, 0, 99), Buffer.from('short')));
    expect(reply).toMatchObject({ len: 16, error: -EINVAL });
    expect(calls).toEqual([]);
  });

  it('what the plane defers stays unanswered here', () => {
    const { plane } = recorder({ write: () => DEFER });
    expect(serve(plane, request(opcode.WRITE, {}, writeArgument(1, 0, 1), Buffer.from('x')))).toEqual([]);
  });

  it.each([
    ['a handle of the main thread', request(opcode.READ, {}, readArgument(4096, 0, 1))],
    [
      'a handle whose high bits are set',
      request(opcode.READ, {}, integers([2n ** 32n, 8], [0, 8], [1, 4], [0, 4], [0, 8], [0, 4], [0, 4])),
    ],
    ['a READ larger than the buffer', request(opcode.READ, {}, readArgument(1, 0, 65537))],
    ['an operation on names', request(opcode.LOOKUP, {}, name('disk.raw'))],
    ['an unknown operation', request(999, {})],
  ])('%s is not its own', (_rule, message) => {
    const { plane, calls } = recorder();
    expect(serve(plane, message)).toEqual([]);
    expect(calls).toEqual([]);
  });
});
