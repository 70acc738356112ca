import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { errnoNumber } from '../../src/os/errno.ts';
import { freebsdLocalSockets } from '../../src/os/freebsd.ts';
import { linuxLocalSockets } from '../../src/os/linux.ts';
import { encodeLocalAddress } from '../../src/os/local-socket.ts';
import { systemCalls } from '../../src/os/system-calls.ts';

describe('struct sockaddr_un', () => {
  it('on Linux: family 1 in 2 bytes, path, NUL', () => {
    expect([...encodeLocalAddress(linuxLocalSockets, '/a')]).toEqual([1, 0, 47, 97, 0]);
  });

  it('on FreeBSD: length of the whole, family 1, path, NUL', () => {
    expect([...encodeLocalAddress(freebsdLocalSockets, '/a')]).toEqual([5, 1, 47, 97, 0]);
  });

  it('a path that does not fit with its NUL is refused', () => {
    expect(encodeLocalAddress(linuxLocalSockets, 'x'.repeat(107))).toHaveLength(110);
    expect(() => encodeLocalAddress(linuxLocalSockets, 'x'.repeat(108))).toThrow('at most 107 bytes');
    expect(() => encodeLocalAddress(freebsdLocalSockets, 'é'.repeat(52))).toThrow('at most 103 bytes');
  });
});

describe.runIf(process.platform === 'linux' || process.platform === 'freebsd')('a connection', () => {
  it('carries bytes as a socket of Node, and names the process at its other end', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'vdskfs-socket-'));
    const path = join(folder, 'socket');
    const server = createServer((client) => client.end('hello')).listen(path);
    try {
      await new Promise((resolve) => server.once('listening', resolve));
      const fd = systemCalls().connectLocal(path, 'stream');
      expect(systemCalls().peerProcess(fd)).toBe(process.pid);
      let text = '';
      for await (const chunk of new Socket({ fd, readable: true, writable: true })) text += chunk;
      expect(text).toBe('hello');
    } finally {
      server.close();
      rmSync(folder, { recursive: true });
    }
    expect(systemCalls().connectLocal(path, 'stream')).toBe(-errnoNumber('ENOENT'));
  });
});
