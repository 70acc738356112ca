import { createServer } from 'node:net';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { boundSockets, parseProcNetUnix, parseSockstat } from '../../src/os/bound-sockets.ts';
import { withDirectory } from '../e2e/run.ts';

describe('bound sockets', () => {
  it('of /proc/net/unix', () => {
    const text = `Num       RefCount Protocol Flags    Type St Inode Path
000000003d3ba997: 00000003 00000000 00000000 0001 03   546
00000000ffa4d905: 00000002 00000000 00010000 0001 01   547 /var/run/bhyve/web0
0000000000000000: 00000002 00000000 00000000 0002 01 12345 /var/run/bhyve/a b
0000000000000001: 00000002 00000000 00010000 0005 01 12346 relative
0000000000000002: 00000002 00000000 00010000 0001 01 12347 @abstract
`;
    expect(parseProcNetUnix(text)).toEqual([
      { path: '/var/run/bhyve/web0', type: 'stream' },
      { path: '/var/run/bhyve/a b', type: 'datagram' },
      { path: 'relative', type: 'other' },
    ]);
  });

  it('of sockstat -u', () => {
    const text = `USER     COMMAND    PID   FD  PROTO  LOCAL ADDRESS         FOREIGN ADDRESS
root     bhyve      1234  9   stream /var/run/bhyve/web0
root     bhyve      1235  9   dgram  /var/run/bhyve/web1
root     my prog    1236  5   stream -> /var/run/devd.pipe
root     syslogd    700   6   dgram  (not connected)
root     bhyve      1237  9   stream /var/run/bhyve/a b <- [77 3],[78 4]
root     bhyve      1238  9   stream /var/run/bhyve/web2 -> [77 5]
root     devd       500   4   seqpac /var/run/devd.seqpacket.pipe
`;
    expect(parseSockstat(text)).toEqual([
      { path: '/var/run/bhyve/web0', type: 'stream' },
      { path: '/var/run/bhyve/web1', type: 'datagram' },
      { path: '/var/run/bhyve/a b', type: 'stream' },
      { path: '/var/run/bhyve/web2', type: 'stream' },
      { path: '/var/run/devd.seqpacket.pipe', type: 'other' },
    ]);
  });

  it('of this host: there as long as someone listens', () =>
    withDirectory(async (directory) => {
      const path = join(directory, 'socket');
      const bound = async () => (await boundSockets())?.filter((one) => one.path === path);
      expect(await bound()).toEqual([]);
      const server = createServer();
      await new Promise<void>((resolve) => server.listen(path, resolve));
      expect(await bound()).toEqual([{ path, type: 'stream' }]);
      await new Promise((resolve) => server.close(resolve));
      expect(await bound()).toEqual([]);
    }));
});
