/**
 * Lines of JSON over a socket of the UNIX domain: the framing that QMP and the guest agent share. What comes in is
 * hostile: a line may be too long or no JSON at all, and either ends the connection.
 */
import { Socket } from 'node:net';
import debug from 'debug';
import { FsError } from '../../errors.ts';
import { fsErrorFrom } from '../../os/errno.ts';
import { systemCalls } from '../../os/system-calls.ts';

const log = debug('vdskfs:qmp');

/** The longest answer that is kept in memory: QEMU's lists of block nodes have some KiB per node. */
const LINE_BYTES = 16 * 1024 * 1024;
const NEWLINE = 0x0a;
/** Never a part of UTF-8: the guest agent puts it before the first answer that counts. */
const RESTART = 0xff;

export interface JsonSocketOptions {
  readonly path: string;
  /** Who listens there, as sentences name it: "QEMU". */
  readonly peer: string;
  readonly message: (value: unknown) => void;
  /** Called once, whoever ended it and why. Nothing is received any more. */
  readonly end: (reason: FsError) => void;
}

export class JsonSocket implements Disposable {
  readonly #socket: Socket;
  readonly #fd: number;
  readonly #options: JsonSocketOptions;
  #parts: Uint8Array[] = [];
  #partBytes = 0;
  #ended = false;

  /** @throws FsError ENOTCONN where nobody listens, EBUSY where another client is served, EACCES … */
  constructor(options: JsonSocketOptions) {
    this.#options = options;
    this.#fd = connect(options);
    this.#socket = new Socket({ fd: this.#fd, readable: true, writable: true });
    this.#socket.on('data', (chunk: Uint8Array) => this.#receive(chunk));
    this.#socket.on('error', (error) => this.#end(fsErrorFrom(error, `the connection to ${this.#who()} broke`)));
    this.#socket.on('close', () => this.#end(new FsError('EIO', `${this.#who()} closed the connection.`)));
  }

  /** The process at the other end. */
  get peerProcess(): number | undefined {
    return this.#ended ? undefined : systemCalls().peerProcess(this.#fd);
  }

  /** @param prefix bytes before the line */
  send(value: unknown, prefix: readonly number[] = []): void {
    log('%s is told %j', this.#options.path, value);
    if (!this.#ended) this.#socket.write(Buffer.concat([Uint8Array.from(prefix), encode(value)]));
  }

  /** Send a line and an open descriptor with it, which stays the caller's to close. @throws FsError */
  sendWithDescriptor(value: unknown, descriptor: number): void {
    if (this.#ended) return;
    log('%s is told %j, with a descriptor', this.#options.path, value);
    const line = encode(value);
    // Around Node's stream: nothing of it may still wait to be sent.
    const sent = this.#socket.writableLength === 0 ? systemCalls().send(this.#fd, line, [descriptor]) : 0;
    if (sent === line.length) return;
    this.#end(new FsError('EIO', `a command with a descriptor did not go to ${this.#who()} in one piece.`));
  }

  [Symbol.dispose](): void {
    this.#end(new FsError('EIO', `the connection to ${this.#who()} was given up.`));
  }

  #who(): string {
    return `${this.#options.peer} at '${this.#options.path}'`;
  }

  #receive(chunk: Uint8Array): void {
    for (let from = 0; from < chunk.length && !this.#ended; ) {
      const newline = chunk.indexOf(NEWLINE, from);
      const to = newline < 0 ? chunk.length : newline;
      this.#parts.push(chunk.subarray(from, to));
      this.#partBytes += to - from;
      if (this.#partBytes > LINE_BYTES) {
        this.#end(new FsError('EIO', `${this.#who()} sent a line of more than ${LINE_BYTES} bytes.`));
      } else if (newline >= 0) {
        this.#line();
      }
      from = to + 1;
    }
  }

  #line(): void {
    const whole = Buffer.concat(this.#parts);
    this.#parts = [];
    this.#partBytes = 0;
    const text = whole.subarray(whole.lastIndexOf(RESTART) + 1).toString();
    if (text.trim() === '') return;
    let value: unknown;
    try {
      value = JSON.parse(text);
    } catch {
      this.#end(new FsError('EIO', `${this.#who()} sent what is no JSON: ${JSON.stringify(text.slice(0, 80))}.`));
      return;
    }
    log('%s says %j', this.#options.path, value);
    this.#options.message(value);
  }

  #end(reason: FsError): void {
    if (this.#ended) return;
    this.#ended = true;
    log('%s', reason.message);
    this.#socket.destroy();
    this.#options.end(reason);
  }
}

const encode = (value: unknown): Buffer => Buffer.from(`${JSON.stringify(value)}\n`);

function connect({ path, peer }: JsonSocketOptions): number {
  const fd = systemCalls().connectLocal(path, 'stream');
  if (fd >= 0) return fd;
  const failure = fsErrorFrom(-fd, `cannot connect to ${peer} at '${path}'`);
  switch (failure.errno) {
    case 'ENOENT':
    case 'ENOTCONN':
      throw new FsError('ENOTCONN', `${peer} does not run: nobody listens at '${path}'.`, { cause: failure });
    case 'EAGAIN':
      throw new FsError('EBUSY', `${peer} serves another client at '${path}', and one only.`, { cause: failure });
    default:
      throw failure;
  }
}
