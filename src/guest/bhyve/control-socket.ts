/** The control socket of a running bhyve: where it is, which dialect it speaks, and a request through it. */
import { closeSync } from 'node:fs';
import { open, realpath } from 'node:fs/promises';
import { Socket } from 'node:net';
import { basename, isAbsolute, join } from 'node:path';
import { FsError } from '../../errors.ts';
import { type BoundSocket, boundSockets } from '../../os/bound-sockets.ts';
import { fsErrorFrom } from '../../os/errno.ts';
import { systemCalls } from '../../os/system-calls.ts';
import { checkPathLength, dialects, type Generation, type SaveRequest, streamGenerations } from './generation.ts';
import { decodeNvlist } from './nvlist.ts';

export const DEFAULT_RUN_DIRECTORY = '/var/run/bhyve';

export interface ControlSocket {
  readonly path: string;
  /** What to try, in order; more than one where nothing tells which of them it is. */
  readonly generations: readonly Generation[];
}

/**
 * Find the socket of the guest `name` without touching it: generation A takes an empty connection for a repetition of
 * the request before it, and later ones serve no one else while a connection is silent. A file that a killed bhyve has
 * left behind does not count.
 * @param osreldate of the host, if known
 */
export async function findControlSocket(
  runDirectory: string,
  name: string,
  osreldate: number | undefined,
): Promise<ControlSocket | undefined> {
  const bound = (await boundSockets()) ?? [];
  const path = join(runDirectory, name);
  const type = await typeBoundAt(path, bound);
  if (type === 'datagram') return { path, generations: ['B'] };
  if (type === 'stream') return { path, generations: streamGenerations(osreldate) };
  const first = join(runDirectory, 'checkpoint', name);
  return (await typeBoundAt(first, bound)) === 'stream' ? { path: first, generations: ['A'] } : undefined;
}

/** Undefined if no one has a socket there. The server may have bound it under another of its names: /run is /var/run. */
async function typeBoundAt(path: string, bound: readonly BoundSocket[]): Promise<BoundSocket['type'] | undefined> {
  const real = await realPath(path);
  if (real === undefined) return undefined;
  for (const socket of bound) {
    if (socket.path === path) return socket.type;
    if (basename(socket.path) !== basename(real)) continue;
    // A relative name is the server's own business: the last part has to do.
    if (!isAbsolute(socket.path) || (await realPath(socket.path)) === real) return socket.type;
  }
  return undefined;
}

const realPath = (path: string): Promise<string | undefined> => realpath(path).catch(() => undefined);

/** A request on its way. */
export interface SentRequest {
  /**
   * Resolves when bhyve has closed its end, good or bad: it does so once it has finished. Undefined for a dialect that
   * has no connection.
   */
  readonly answered: Promise<Answer> | undefined;
}

/** What bhyve said before it closed: nothing, in most generations. */
export interface Answer {
  readonly error: string | undefined;
}

/** More than any answer has. */
const ANSWER_BYTES_MAX = 64 * 1024;

/**
 * Send one request, whole and at once. The connection stays open until bhyve closes it, whatever becomes of the one
 * who asked: a bhyve that answers into a closed socket would die of SIGPIPE.
 */
export async function sendRequest(path: string, generation: Generation, request: SaveRequest): Promise<SentRequest> {
  checkPathLength(generation, request);
  const { socket: type, passesDirectory, encode } = dialects[generation];
  const message = encode(request);
  const os = systemCalls();
  // Not openSync: the folder may be in the tree that this very thread serves.
  const directory = passesDirectory ? await open(request.directory, 'r') : undefined;
  let fd: number | undefined;
  try {
    const connected = os.connectLocal(path, type);
    if (connected < 0) throw fsErrorFrom(-connected, `cannot connect to '${path}'`);
    fd = connected;
    const sent = os.send(fd, message, []);
    if (sent !== message.byteLength) {
      throw new FsError('EIO', `'${path}' took ${sent} of the request's ${message.byteLength} bytes`);
    }
    // libnv: one more packet of one byte carries the descriptor.
    if (directory !== undefined) os.send(fd, new Uint8Array(1), [directory.fd]);
  } catch (error) {
    if (fd !== undefined) closeSync(fd);
    throw error;
  } finally {
    await directory?.close();
  }
  if (type === 'datagram') {
    closeSync(fd);
    return { answered: undefined };
  }
  return { answered: receiveAnswer(fd) };
}

function receiveAnswer(fd: number): Promise<Answer> {
  return new Promise((resolve) => {
    const socket = new Socket({ fd, readable: true, writable: true, allowHalfOpen: true });
    const parts: Buffer[] = [];
    let bytes = 0;
    socket.on('data', (part: Buffer) => {
      bytes += part.length;
      if (bytes <= ANSWER_BYTES_MAX) parts.push(part);
    });
    // A reset is an end as well: the server closed before it had read all.
    socket.on('error', () => {});
    socket.on('end', () => socket.destroy());
    socket.on('close', () => resolve({ error: errorIn(Buffer.concat(parts)) }));
  });
}

/** What an answer says went wrong. One that cannot be read says nothing: the files that were written decide. */
export function errorIn(answer: Uint8Array): string | undefined {
  if (answer.byteLength === 0) return undefined;
  try {
    const error = decodeNvlist(answer).get('error');
    return typeof error === 'string' ? error : undefined;
  } catch {
    return undefined;
  }
}
