/**
 * The dialects that control sockets of bhyve have spoken over the years, as data: who speaks which, and what a request
 * looks like. Letters in the order of time; see docs/bhyve.md.
 *
 * - A: FreeBSD 13.0 and before it main of 2020. A struct of 104 bytes through a stream.
 * - B: main of 2021. A struct of 1028 bytes in one datagram.
 * - C: 13.2 and later 13.x. An nvlist through a stream; the file is named by its path.
 * - D: 14.0 and later. As C, but the folder comes as a descriptor and the file is named in it. Later versions answer
 *   with one nvlist before they close; the request is the same.
 *
 * `either` is for a host that does not say which of C and D it is: everything that both want, and the whole path. C
 * passes over the descriptor; D opens the path itself, unless it is in capability mode, where it refuses without harm.
 */
import { join } from 'node:path';
import { FsError } from '../../errors.ts';
import { encodeNvlist, type NvValue } from './nvlist.ts';

export type Generation = 'A' | 'B' | 'C' | 'D' | 'either';

/** Write the guest's state to `directory`/`name`. */
export interface SaveRequest {
  readonly directory: string;
  readonly name: string;
  readonly suspend: boolean;
}

interface Dialect {
  readonly socket: 'stream' | 'datagram';
  /** Longest path of the memory file in bytes. bhyve adds `.kern` and `.meta` to it in a buffer of fixed size. */
  readonly pathBytesMax: number;
  /** The folder travels as a descriptor behind the message. */
  readonly passesDirectory: boolean;
  encode(request: SaveRequest): Uint8Array;
}

const pathOf = ({ directory, name }: SaveRequest): string => join(directory, name);

/** snapshot.h: the operation, then a path of fixed size, both in the order of the host's bytes. */
function structMessage(bytes: number, request: SaveRequest): Uint8Array {
  const message = Buffer.alloc(bytes);
  message.writeUInt32LE(request.suspend ? 1 : 0);
  message.write(pathOf(request), 4);
  return message;
}

const listMessage = (suspend: boolean, filename: string, more: readonly (readonly [string, NvValue])[]): Uint8Array =>
  encodeNvlist(
    new Map<string, NvValue>([['cmd', 'checkpoint'], ['filename', filename], ['suspend', suspend], ...more]),
  );

const DIRECTORY = ['fddir', { descriptor: 0 }] as const;

export const dialects: Readonly<Record<Generation, Dialect>> = {
  A: { socket: 'stream', pathBytesMax: 95, passesDirectory: false, encode: (request) => structMessage(104, request) },
  B: {
    socket: 'datagram',
    pathBytesMax: 95,
    passesDirectory: false,
    encode: (request) => structMessage(1028, request),
  },
  C: {
    socket: 'stream',
    pathBytesMax: 250,
    passesDirectory: false,
    encode: (request) => listMessage(request.suspend, pathOf(request), []),
  },
  D: {
    socket: 'stream',
    pathBytesMax: Number.POSITIVE_INFINITY,
    passesDirectory: true,
    encode: (request) => listMessage(request.suspend, request.name, [DIRECTORY]),
  },
  either: {
    socket: 'stream',
    pathBytesMax: 250,
    passesDirectory: true,
    encode: (request) => listMessage(request.suspend, pathOf(request), [DIRECTORY]),
  },
};

/** kern.osreldate of the first release that speaks C, and of the first that speaks D. */
const FIRST_C = 1_302_000;
const FIRST_D = 1_400_000;

/** The nvlist generations of a stream socket by the host's release; all that may be tried, in order, if it is unknown. */
export function streamGenerations(osreldate: number | undefined): readonly Generation[] {
  if (osreldate === undefined) return ['either', 'D', 'C'];
  return osreldate >= FIRST_D ? ['D'] : ['C'];
}

/** The longest path that `bhyve -r` takes on that release: the limit of the same code that saves. */
export const restorePathBytesMax = (osreldate: number | undefined): number =>
  osreldate !== undefined && osreldate < FIRST_C ? dialects.A.pathBytesMax : dialects.C.pathBytesMax;

/** @throws FsError ENAMETOOLONG: bhyve would cut the name, or say nothing and write no checkpoint */
export function checkPathLength(generation: Generation, request: SaveRequest): void {
  const path = pathOf(request);
  const max = dialects[generation].pathBytesMax;
  if (Buffer.byteLength(path) <= max) return;
  throw new FsError(
    'ENAMETOOLONG',
    `this bhyve takes at most ${max} bytes for a state file's path, and '${path}' has ${Buffer.byteLength(path)}: mount at a shorter path`,
  );
}
