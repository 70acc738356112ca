/** One mount on the main thread: takes the requests that the data threads pass on, and answers each exactly once. */

import { FsError } from '../errors.ts';
import { errnoNumber } from '../os/errno.ts';
import type { Caller, FileSystem } from './filesystem.ts';
import { HandleTable } from './handle-table.ts';
import { type Handlers, makeHandlers, type Reply } from './handlers.ts';
import { answerInit, decodeInit, type System } from './init.ts';
import { NodeTable } from './node-table.ts';
import { operationOf, operations } from './operations.ts';
import { encodeEmptyReply, encodeReplyHeader, NOTHING } from './reply.ts';
import { decodeHeader, decodeRequest, type Request } from './request.ts';
import { type InHeader, inHeader } from './structures.ts';

export interface SessionOptions {
  readonly fileSystem: FileSystem;
  readonly system: System;
  /** Give the kernel one reply, in one write. False: nobody waits for it any more. */
  readonly send: (header: Uint8Array, body: Uint8Array) => boolean;
  /** Called with what was thrown and should not have been. */
  readonly report: (error: unknown, operation: string) => void;
}

/** INTERRUPTs kept for requests that have not arrived yet: several threads read, so the order is not the kernel's. */
const EARLY_INTERRUPTS_MAX = 64;

export class Session {
  readonly #options: SessionOptions;
  readonly #handles = new HandleTable();
  readonly #handlers: Handlers;
  /** Requests being worked on, by unique. */
  readonly #callers = new Map<bigint, RequestCaller>();
  readonly #working = new Set<Promise<void>>();
  readonly #earlyInterrupts = new Set<bigint>();
  #initialised: { resolve: () => void; reject: (error: unknown) => void } | undefined;

  /** Resolves when INIT is answered: from then on the tree answers. Rejects if the kernel is too old. */
  readonly initialised: Promise<void>;

  constructor(options: SessionOptions) {
    this.#options = options;
    this.#handlers = makeHandlers(options.fileSystem, new NodeTable(options.fileSystem.root), this.#handles);
    this.initialised = new Promise((resolve, reject) => {
      this.#initialised = { resolve, reject };
    });
    // Whoever does not wait for it is told by close() or by the mount's end.
    this.initialised.catch(() => {});
  }

  /** Take one message of the kernel. Returns at once. */
  receive(message: Uint8Array): void {
    let header: InHeader;
    try {
      header = decodeHeader(message);
    } catch (error) {
      this.#options.report(error, 'message');
      return;
    }
    const work = this.#serve(header, message).catch((error) => this.#options.report(error, nameOf(header)));
    this.#working.add(work);
    work.finally(() => this.#working.delete(work));
  }

  /** The mount has ended: interrupt what still runs, wait for it, and release every open file. */
  async close(): Promise<void> {
    this.#initialised?.reject(new FsError('EIO', 'the mount ended before the kernel asked anything'));
    for (const caller of this.#callers.values()) caller.interrupt();
    await Promise.all(this.#working);
    for (const open of this.#handles.removeAll()) {
      await open.release().catch((error) => this.#options.report(error, 'RELEASE'));
    }
  }

  async #serve(header: InHeader, message: Uint8Array): Promise<void> {
    const caller = new RequestCaller(header);
    this.#callers.set(header.unique, caller);
    if (this.#earlyInterrupts.delete(header.unique)) caller.interrupt();
    let reply: Reply | undefined;
    let errno = 0;
    try {
      reply = await this.#dispatch(decodeRequest(header, message), message, caller);
    } catch (error) {
      if (!(error instanceof FsError)) this.#options.report(error, nameOf(header));
      errno = errnoNumber(error instanceof FsError ? error.errno : 'EIO');
    } finally {
      this.#callers.delete(header.unique);
    }
    if (!isAnswered(header)) return;
    const { unique } = header;
    if (reply === undefined) {
      this.#options.send(encodeEmptyReply(unique, -errno), NOTHING);
      return;
    }
    const arrived = this.#options.send(encodeReplyHeader(unique, reply.body.length), reply.body);
    await (arrived ? reply.arrived?.() : reply.lost?.());
  }

  async #dispatch(request: Request, message: Uint8Array, caller: Caller): Promise<Reply> {
    switch (request.name) {
      case 'INIT':
        return this.#initialise(message);
      case 'INTERRUPT':
        this.#interrupt(request.arg.unique);
        return { body: NOTHING };
      case 'NOTIFY_REPLY':
        return { body: NOTHING };
      default: {
        const handler = this.#handlers[request.name] as (request: Request, caller: Caller) => Reply | Promise<Reply>;
        return handler(request, caller);
      }
    }
  }

  #initialise(message: Uint8Array): Reply {
    try {
      const { body, agreed } = answerInit(decodeInit(message.subarray(inHeader.bytes)), this.#options.system);
      return agreed ? { body, arrived: () => this.#initialised?.resolve() } : { body };
    } catch (error) {
      this.#initialised?.reject(error);
      throw error;
    }
  }

  #interrupt(unique: bigint): void {
    const caller = this.#callers.get(unique);
    if (caller !== undefined) {
      caller.interrupt();
      return;
    }
    // Either answered by now, or still to come; numbers are never used twice, so remembering it does no harm.
    this.#earlyInterrupts.add(unique);
    if (this.#earlyInterrupts.size > EARLY_INTERRUPTS_MAX) {
      for (const oldest of this.#earlyInterrupts) {
        this.#earlyInterrupts.delete(oldest);
        break;
      }
    }
  }
}

/** The Caller of one request. */
class RequestCaller implements Caller {
  readonly uid: number;
  readonly gid: number;
  readonly pid: number;
  /** Made when first asked for: most requests end without. */
  #controller: AbortController | undefined;
  #interrupted = false;

  constructor(header: InHeader) {
    this.uid = header.uid;
    this.gid = header.gid;
    this.pid = header.pid;
  }

  get signal(): AbortSignal {
    if (this.#controller === undefined) {
      this.#controller = new AbortController();
      if (this.#interrupted) this.#abort();
    }
    return this.#controller.signal;
  }

  interrupt(): void {
    this.#interrupted = true;
    this.#abort();
  }

  #abort(): void {
    this.#controller?.abort(new FsError('EINTR', 'the caller was interrupted'));
  }
}

const nameOf = (header: InHeader): string => operationOf(header.opcode) ?? `operation ${header.opcode}`;

/** Unknown operations are answered too, with ENOSYS. */
function isAnswered(header: InHeader): boolean {
  const name = operationOf(header.opcode);
  return name === undefined || operations[name].reply === 'always';
}
