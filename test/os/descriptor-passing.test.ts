import { spawnSync } from 'node:child_process';
import {
  closeSync,
  fstatSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readSync,
  rmdirSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import type { FsError } from '../../src/errors.ts';
import {
  decodeRights,
  encodeRights,
  layOutMessage,
  MAX_DESCRIPTORS,
  messageBytes,
} from '../../src/os/descriptor-passing.ts';
import { freebsdSockets } from '../../src/os/freebsd.ts';
import { linuxSockets } from '../../src/os/linux.ts';
import { systemCalls } from '../../src/os/system-calls.ts';

describe('an SCM_RIGHTS control message', () => {
  it('on Linux: cmsg_len 20 in 8 bytes, SOL_SOCKET 1, SCM_RIGHTS 1, the descriptor, padding to 8', () => {
    expect([...encodeRights(linuxSockets, [7])]).toEqual([
      ...[20, 0, 0, 0, 0, 0, 0, 0],
      ...[1, 0, 0, 0, 1, 0, 0, 0],
      ...[7, 0, 0, 0, 0, 0, 0, 0],
    ]);
  });

  it('on FreeBSD: cmsg_len 20 in 4 bytes, SOL_SOCKET 0xffff, SCM_RIGHTS 1, padding, the descriptor, padding to 8', () => {
    expect([...encodeRights(freebsdSockets, [7])]).toEqual([
      ...[20, 0, 0, 0, 0xff, 0xff, 0, 0],
      ...[1, 0, 0, 0, 0, 0, 0, 0],
      ...[7, 0, 0, 0, 0, 0, 0, 0],
    ]);
  });

  it.each([
    ['Linux', linuxSockets],
    ['FreeBSD', freebsdSockets],
  ])('on %s comes back as it went, several in one message and one in each of several', (_system, abi) => {
    expect(encodeRights(abi, [])).toHaveLength(0);
    expect(decodeRights(abi, encodeRights(abi, [3, 4, 5]))).toEqual([3, 4, 5]);
    const several = new Uint8Array([...encodeRights(abi, [3]), ...encodeRights(abi, [4, 5])]);
    expect(decodeRights(abi, several)).toEqual([3, 4, 5]);
  });

  it.each([
    ['of another kind', (c: Uint8Array) => c.fill(2, 12, 13), []],
    ['shorter than its header', (c: Uint8Array) => c.fill(15, 0, 1), []],
    ['longer than what there is', (c: Uint8Array) => c.fill(25, 0, 1), []],
    ['of length zero', (c: Uint8Array) => c.fill(0, 0, 1), []],
  ])('%s gives no descriptors, and ends', (_what, spoil, expected) => {
    expect(decodeRights(linuxSockets, spoil(encodeRights(linuxSockets, [7])))).toEqual(expected);
  });
});

describe('struct msghdr', () => {
  const address = 0x1000n;
  const fields = (abi: typeof linuxSockets, control: number) => {
    const sizes = { control, data: 1 };
    const memory = new Uint8Array(messageBytes(abi, sizes));
    const message = layOutMessage(abi, memory, address, sizes);
    return { memory, message, words: [...new Uint32Array(memory.buffer, 0, Math.floor(memory.byteLength / 4))] };
  };

  it('on Linux: name, iov and its count in 8 bytes, control and its length in 8 bytes, flags', () => {
    const { memory, message, words } = fields(linuxSockets, 24);
    expect(words.slice(0, 14)).toEqual([
      ...[0, 0, 0, 0], // msg_name, msg_namelen, padding
      ...[0x1038, 0, 1, 0], // msg_iov behind the 56 bytes, msg_iovlen
      ...[0x1048, 0, 24, 0], // msg_control, msg_controllen
      ...[0, 0], // msg_flags, padding
    ]);
    expect(words.slice(14, 18)).toEqual([0x1060, 0, 1, 0]); // iov_base, iov_len
    expect(message).toMatchObject({ control: { at: 0x48, bytes: 24 }, data: { at: 0x60, bytes: 1 } });
    expect(memory).toHaveLength(0x61);
  });

  it('on FreeBSD: name, iov and its count in 4 bytes, control and its length in 4 bytes, flags', () => {
    const { words } = fields(freebsdSockets, 24);
    expect(words.slice(0, 12)).toEqual([
      ...[0, 0, 0, 0], // msg_name, msg_namelen, padding
      ...[0x1030, 0, 1, 0], // msg_iov behind the 48 bytes, msg_iovlen, padding
      ...[0x1040, 0, 24, 0], // msg_control, msg_controllen, msg_flags
    ]);
    expect(words.slice(12, 16)).toEqual([0x1058, 0, 1, 0]); // iov_base, iov_len
  });

  it('without control data points at none', () => {
    expect(fields(linuxSockets, 0).words.slice(8, 12)).toEqual([0, 0, 0, 0]);
  });
});

describe.runIf(process.platform === 'linux' || process.platform === 'freebsd')('between two sockets', () => {
  const errnoOf = (action: () => unknown): string => {
    try {
      action();
    } catch (error) {
      return (error as FsError).errno;
    }
    return 'none';
  };

  function withPair(action: (here: number, there: number) => void): void {
    const [here, there] = systemCalls().socketPair('stream');
    try {
      action(here, there);
    } finally {
      closeSync(here);
      closeSync(there);
    }
  }

  it('a descriptor arrives with its data, open on the same file', () => {
    const folder = mkdtempSync(join(tmpdir(), 'vdskfs-descriptors-'));
    writeFileSync(join(folder, 'a'), 'hello');
    const file = openSync(join(folder, 'a'), 'r');
    withPair((here, there) => {
      expect(systemCalls().send(here, Uint8Array.of(0, 9), [file, file])).toBe(2);
      closeSync(file);
      const data = new Uint8Array(10).fill(1);
      const { bytes, descriptors } = systemCalls().receive(there, data, true);
      expect([bytes, ...data.subarray(0, 3)]).toEqual([2, 0, 9, 1]);
      expect(descriptors).toHaveLength(2);
      const text = Buffer.alloc(5);
      readSync(descriptors[1] as number, text, 0, 5, 0);
      expect(text.toString()).toBe('hello');
      for (const fd of descriptors) closeSync(fd);
    });
    rmSync(folder, { recursive: true });
  });

  it('without waiting there is EAGAIN, and at the end no bytes', () => {
    const [here, there] = systemCalls().socketPair('stream');
    expect(errnoOf(() => systemCalls().receive(there, new Uint8Array(1), false))).toBe('EAGAIN');
    closeSync(here);
    expect(systemCalls().receive(there, new Uint8Array(1), true)).toEqual({ bytes: 0, descriptors: [] });
    expect(errnoOf(() => systemCalls().send(there, Uint8Array.of(0), []))).toBe('EIO');
    closeSync(there);
  });

  it('more descriptors than a message takes are refused before they are sent', () => {
    withPair((here) => {
      const many = new Array<number>(MAX_DESCRIPTORS + 1).fill(here);
      expect(errnoOf(() => systemCalls().send(here, Uint8Array.of(0), many))).toBe('EINVAL');
      expect(errnoOf(() => systemCalls().send(here, Uint8Array.of(0), [1_000_000]))).toBe('EBADF');
    });
  });

  it.runIf(process.platform === 'linux')('the sockets and what is received are close-on-exec', () => {
    const closesOnExec = (fd: number) => {
      const flags = /^flags:\s+(\d+)$/m.exec(readFileSync(`/proc/self/fdinfo/${fd}`, 'utf8'))?.[1];
      return (Number.parseInt(flags as string, 8) & 0o2000000) !== 0;
    };
    withPair((here, there) => {
      systemCalls().send(here, Uint8Array.of(0), [here]);
      const received = systemCalls().receive(there, new Uint8Array(1), true).descriptors[0] as number;
      expect([here, there, received].map(closesOnExec)).toEqual([true, true, true]);
      closeSync(received);
    });
  });
});

describe.runIf(process.platform === 'linux')('with fusermount3', () => {
  it('the open device of a fresh mount comes through the socket that the child inherited', () => {
    const mountpoint = mkdtempSync(join(tmpdir(), 'vdskfs-fusermount-'));
    const [ours, childs] = systemCalls().socketPair('stream');
    const mounted = spawnSync('fusermount3', ['-o', 'fsname=vdskfs-test', '--', mountpoint], {
      stdio: ['ignore', 'ignore', 'inherit', childs],
      env: { ...process.env, _FUSE_COMMFD: '3' },
    });
    closeSync(childs);
    try {
      expect(mounted.status).toBe(0);
      const data = Uint8Array.of(1);
      const { bytes, descriptors } = systemCalls().receive(ours, data, false);
      expect([bytes, data[0], descriptors.length]).toEqual([1, 0, 1]);
      const device = descriptors[0] as number;
      expect(fstatSync(device).isCharacterDevice()).toBe(true);
      closeSync(device);
    } finally {
      closeSync(ours);
      expect(spawnSync('fusermount3', ['-u', '-z', mountpoint]).status).toBe(0);
      rmdirSync(mountpoint);
    }
  });
});
