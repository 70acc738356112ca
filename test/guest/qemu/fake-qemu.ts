/** A QMP server in this process: it greets, takes commands one line at a time, and answers what a test says. */
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

export type Arguments = Readonly<Record<string, unknown>>;

/** The value of `return`; a `Refusal` thrown becomes an error answer. */
export type Answer = (args: Arguments, connection: Socket, folder: string) => unknown;

export class Refusal extends Error {
  readonly class: string;

  constructor(desc: string, errorClass = 'GenericError') {
    super(desc);
    this.class = errorClass;
  }
}

export interface FakeQemu extends AsyncDisposable {
  readonly path: string;
  readonly folder: string;
  /** Commands so far, each with its arguments, without qmp_capabilities. */
  readonly commands: readonly (readonly [string, Arguments])[];
  /** Connections so far, and those open now. */
  readonly connections: { made: number; open: number };
}

export interface FakeQemuOptions {
  readonly version?: readonly [number, number, number];
  /** What it says to a new client; undefined: a greeting. */
  readonly greet?: (connection: Socket) => void;
}

export const greeting = ([major, minor, micro]: readonly [number, number, number] = [7, 2, 22]): string =>
  `${JSON.stringify({ QMP: { version: { qemu: { major, minor, micro }, package: 'Debian 1' }, capabilities: [] } })}\r\n`;

export async function fakeQemu(
  answers: Readonly<Record<string, Answer>>,
  options: FakeQemuOptions = {},
): Promise<FakeQemu> {
  const folder = mkdtempSync(join(tmpdir(), 'vdskfs-qmp-'));
  const path = join(folder, 'qmp.sock');
  const commands: [string, Arguments][] = [];
  const connections = { made: 0, open: 0 };
  const sockets = new Set<Socket>();
  const greet = options.greet ?? ((connection: Socket) => connection.write(greeting(options.version)));
  const server: Server = createServer((connection) => {
    connections.made++;
    connections.open++;
    sockets.add(connection);
    connection.on('error', () => {});
    connection.on('close', () => {
      connections.open--;
      sockets.delete(connection);
    });
    greet(connection);
    let text = '';
    connection.on('data', (chunk) => {
      text += chunk.toString('latin1');
      const lines = text.split('\n');
      text = lines.pop() ?? '';
      for (const line of lines) void answerLine(parse(line), connection);
    });
  });

  async function answerLine(
    message: { execute: string; arguments?: Arguments; id?: unknown },
    connection: Socket,
  ): Promise<void> {
    const { execute, arguments: args = {}, id } = message;
    const reply = (value: object) => connection.writable && connection.write(`${JSON.stringify({ ...value, id })}\r\n`);
    if (execute === 'qmp_capabilities') return void reply({ return: {} });
    commands.push([execute, args]);
    const answer = answers[execute];
    try {
      if (answer === undefined) throw new Refusal(`The command ${execute} has not been found`, 'CommandNotFound');
      reply({ return: await answer(args, connection, folder) });
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      reply({ error: { class: error.class, desc: error.message } });
    }
  }

  await new Promise<void>((resolve) => server.listen(path, resolve));
  return {
    path,
    folder,
    commands,
    connections,
    async [Symbol.asyncDispose]() {
      for (const socket of sockets) socket.destroy();
      await new Promise((resolve) => server.close(resolve));
      rmSync(folder, { recursive: true, force: true });
    },
  };
}

/** Of a line as bytes: the guest agent's clients put 0xff before their first one. */
const parse = (line: string) => JSON.parse(Buffer.from(line.replace(/^\xff/, ''), 'latin1').toString());

/** The errno and the sentence that `work` fails with. */
export async function failureOf(work: Promise<unknown>): Promise<{ errno: string; message: string }> {
  try {
    await work;
  } catch (error) {
    return error as { errno: string; message: string };
  }
  return { errno: 'none', message: 'it succeeded' };
}
