/**
 * Sockets of the UNIX domain that processes have bound to a path: from /proc/net/unix on Linux, by sockstat(1) on
 * FreeBSD. Looking here disturbs no one, as connecting to see who answers would.
 */
import { readFile } from 'node:fs/promises';
import { runCommand } from './run-command.ts';

export interface BoundSocket {
  /** As it was given to bind(2), perhaps relative. */
  readonly path: string;
  readonly type: 'stream' | 'datagram' | 'other';
}

/** Every socket with a path that some process holds; undefined where the system does not tell. */
export async function boundSockets(): Promise<BoundSocket[] | undefined> {
  try {
    switch (process.platform) {
      case 'linux':
        return parseProcNetUnix(await readFile('/proc/net/unix', 'utf8'));
      case 'freebsd':
        return parseSockstat((await runCommand({ program: 'sockstat', args: ['-u'] })).stdout);
      default:
        return undefined;
    }
  } catch {
    return undefined;
  }
}

/** linux/net.h and proc(5): column 5 is the socket type, in hexadecimal. */
const LINUX_TYPES: Readonly<Record<string, BoundSocket['type']>> = { '0001': 'stream', '0002': 'datagram' };

/** Lines "Num: RefCount Protocol Flags Type St Inode Path"; the path may be missing, or start with "@" and be none. */
export function parseProcNetUnix(text: string): BoundSocket[] {
  const line = /^[0-9a-f]+: [0-9A-F]+ [0-9A-F]+ [0-9A-F]+ ([0-9A-F]{4}) [0-9A-F]{2} +\d+ ([^@].*)$/gm;
  return [...text.matchAll(line)].map(([, type, path]) => ({
    path: path as string,
    type: LINUX_TYPES[type as string] ?? 'other',
  }));
}

const SOCKSTAT_TYPES: Readonly<Record<string, BoundSocket['type']>> = { stream: 'stream', dgram: 'datagram' };

/**
 * Lines "USER COMMAND PID FD PROTO PATH", whom it is connected to behind the path: "-> …" or "<- …". A socket that is
 * only connected has no path.
 */
export function parseSockstat(text: string): BoundSocket[] {
  const line = /^\S+\s+\S.*?\s+\d+\s+\d+\s+(stream|dgram|seqpac)\s+((?!->|<-|\(not)\S.*?)(?: +(?:->|<-) .*)?\s*$/gm;
  return [...text.matchAll(line)].map(([, type, path]) => ({
    path: path as string,
    type: SOCKSTAT_TYPES[type as string] ?? 'other',
  }));
}
