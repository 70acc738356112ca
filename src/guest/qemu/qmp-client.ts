/**
 * One connection to QEMU's machine protocol (QEMU documentation, interop/qmp-spec): greeting, capabilities, then
 * commands and answers matched by id. Events are passed over: what is waited for is asked for.
 *
 * A QMP socket serves one client at a time. QEMU's listener accepts no second one, but the kernel does: it connects and
 * hears nothing. So every wait has an end, and connections are short (see Monitor).
 */
import { FsError } from '../../errors.ts';
import { asNumber, asObject, asText, isObject, type JsonObject } from './json-fields.ts';
import { JsonSocket } from './json-socket.ts';

const PEER = 'QEMU';
const GREETING_MS = 5_000;
const ANSWER_MS = 30_000;

/** QEMU refused a command. The sentence is QEMU's own. */
export class QmpError extends FsError {
  override readonly name = 'QmpError';

  constructor(command: string, error: JsonObject) {
    const missing = error.class === 'CommandNotFound';
    const said = typeof error.desc === 'string' ? error.desc : JSON.stringify(error);
    super(missing ? 'ENOTSUP' : 'EIO', `QEMU refused ${command}: ${said.replace(/\.?$/, '.')}`);
  }
}

/** Of the program at the other end; `text` as it names itself: "7.2.22 (Debian 1:7.2+dfsg-7)". */
export interface QemuVersion {
  readonly major: number;
  readonly minor: number;
  readonly text: string;
}

export interface ExecuteOptions {
  /** Goes to QEMU along with the command; stays the caller's to close. */
  readonly descriptor?: number;
  readonly timeoutMs?: number;
}

interface Waiting {
  readonly command: string;
  readonly resolve: (value: unknown) => void;
  readonly reject: (error: Error) => void;
  readonly timer: NodeJS.Timeout;
}

export class QmpClient implements Disposable {
  readonly path: string;
  readonly #socket: JsonSocket;
  readonly #waiting = new Map<number, Waiting>();
  #nextId = 1;
  #ended: FsError | undefined;
  #greet: (greeting: unknown) => void = () => {};
  readonly #greeting: Promise<unknown>;
  #close: () => void = () => {};
  /** Resolves when the connection has ended, by whomever. */
  readonly ended: Promise<void>;
  #version: QemuVersion = { major: 0, minor: 0, text: '' };

  /**
   * Connect and be ready for commands.
   * @throws FsError ENOTCONN where no QEMU listens, ETIMEDOUT where it serves someone else, EIO for what is no QMP
   */
  static async connect(path: string, greetingMs = GREETING_MS): Promise<QmpClient> {
    const client = new QmpClient(path);
    try {
      client.#version = versionIn(await client.#greetingWithin(greetingMs));
      await client.execute('qmp_capabilities', {}, { timeoutMs: greetingMs });
      return client;
    } catch (error) {
      client[Symbol.dispose]();
      throw error;
    }
  }

  private constructor(path: string) {
    this.path = path;
    this.#greeting = new Promise((resolve) => (this.#greet = resolve));
    this.ended = new Promise((resolve) => (this.#close = resolve));
    this.#socket = new JsonSocket({
      path,
      peer: PEER,
      message: (value) => this.#receive(value),
      end: (reason) => this.#end(reason),
    });
  }

  get version(): QemuVersion {
    return this.#version;
  }

  /** QEMU's process, where the system tells and the listener is QEMU's own. */
  get process(): number | undefined {
    return this.#socket.peerProcess;
  }

  /** @throws QmpError with what QEMU said; FsError ETIMEDOUT, EIO when QEMU is gone */
  execute(command: string, args: JsonObject = {}, options: ExecuteOptions = {}): Promise<unknown> {
    const { descriptor, timeoutMs = ANSWER_MS } = options;
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      if (this.#ended !== undefined) return reject(this.#goneDuring(command, this.#ended));
      const timer = setTimeout(() => {
        this.#waiting.delete(id);
        reject(new FsError('ETIMEDOUT', `QEMU did not answer ${command} at '${this.path}' within ${timeoutMs} ms.`));
      }, timeoutMs);
      this.#waiting.set(id, { command, resolve, reject, timer });
      const message = { execute: command, arguments: args, id };
      try {
        if (descriptor === undefined) this.#socket.send(message);
        else this.#socket.sendWithDescriptor(message, descriptor);
      } catch (error) {
        clearTimeout(timer);
        this.#waiting.delete(id);
        reject(error);
      }
    });
  }

  [Symbol.dispose](): void {
    this.#socket[Symbol.dispose]();
  }

  #receive(value: unknown): void {
    if (!isObject(value)) return;
    if ('QMP' in value) this.#greet(value.QMP);
    const waiting = this.#waiting.get(value.id as number);
    if (waiting === undefined) return; // an event, or an answer that came too late
    clearTimeout(waiting.timer);
    this.#waiting.delete(value.id as number);
    if ('return' in value) waiting.resolve(value.return);
    else waiting.reject(new QmpError(waiting.command, isObject(value.error) ? value.error : value));
  }

  async #greetingWithin(timeoutMs: number): Promise<unknown> {
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<never>((_, reject) => {
      timer = setTimeout(() => {
        const sentence = `QEMU at '${this.path}' did not answer within ${timeoutMs} ms: a QMP socket serves one client at a time, and another program may hold this one. Give QEMU a second -qmp socket for vdskfs.`;
        reject(new FsError('ETIMEDOUT', sentence));
      }, timeoutMs);
    });
    const gone = this.ended.then(() => {
      throw this.#ended ?? new FsError('EIO', `QEMU at '${this.path}' closed the connection.`);
    });
    try {
      return await Promise.race([this.#greeting, late, gone]);
    } finally {
      clearTimeout(timer);
      gone.catch(() => {}); // loses the race whenever the connection ends later
    }
  }

  #end(reason: FsError): void {
    this.#ended = reason;
    for (const { command, reject, timer } of this.#waiting.values()) {
      clearTimeout(timer);
      reject(this.#goneDuring(command, reason));
    }
    this.#waiting.clear();
    this.#close();
  }

  #goneDuring(command: string, reason: FsError): FsError {
    return new FsError(reason.errno, `QEMU did not finish ${command}: ${reason.message}`, { cause: reason });
  }
}

function versionIn(greeting: unknown): QemuVersion {
  const version = asObject(asObject(greeting, 'the QMP greeting').version, 'version');
  const qemu = asObject(version.qemu, 'version.qemu');
  const [major, minor, micro] = ['major', 'minor', 'micro'].map((part) => asNumber(qemu[part], part));
  const numbers = `${major}.${minor}.${micro}`;
  const build = asText(version.package, 'version.package').trim();
  return {
    major: major as number,
    minor: minor as number,
    text: build === '' ? numbers : `${numbers} ${build.startsWith('(') ? build : `(${build})`}`,
  };
}
