/**
 * The guest agent (QEMU documentation, interop/qemu-ga): a program in the guest that answers over a serial port, and can
 * let the guest's file systems stand still. It may not run, hang, or serve another client: every wait has an end.
 */
import debug from 'debug';
import { FsError } from '../../errors.ts';
import type { FrozenFileSystems } from '../guest.ts';
import { isObject, type JsonObject } from './json-fields.ts';
import { JsonSocket } from './json-socket.ts';

const log = debug('vdskfs:guest');

/** An agent that runs answers at once. */
const SYNC_MS = 2_000;
/** Freezing flushes all that the guest has not written yet. */
const FREEZE_MS = 30_000;
const THAW_MS = 10_000;
const THAW_ATTEMPTS = 3;
/** Before the first command: what the agent has received so far is no part of it. */
const RESTART = [0xff];

/** @returns undefined where no agent answers at `path`, or where it could not freeze anything */
export async function freezeByAgent(path: string): Promise<FrozenFileSystems | undefined> {
  let frozen: unknown;
  try {
    frozen = await agentCommand(path, 'guest-fsfreeze-freeze', FREEZE_MS);
  } catch (error) {
    log('no file system frozen: %s', (error as Error).message);
    // The agent may be about to: after a wait that was too short, or when only some of them froze.
    if (!(error instanceof NoAgent)) await thaw(path).catch(() => {});
    return undefined;
  }
  log('%o file systems frozen', frozen);
  if (frozen === 0) return undefined;
  return { thaw: () => thaw(path) };
}

/** @throws FsError if the guest's file systems may still stand still */
async function thaw(path: string): Promise<void> {
  for (let attempt = 1; ; attempt++) {
    try {
      await agentCommand(path, 'guest-fsfreeze-thaw', THAW_MS);
      return;
    } catch (error) {
      if (attempt < THAW_ATTEMPTS) continue;
      const sentence = `The guest's file systems may still be frozen: ${(error as Error).message} In the guest, fsfreeze -u lets them go on.`;
      throw new FsError('EIO', sentence, { cause: error });
    }
  }
}

/** Nobody answered at all: there is no agent, and nothing was asked of one. */
class NoAgent extends FsError {}

/** One command over a connection of its own. @throws NoAgent, FsError with what the agent said */
async function agentCommand(path: string, command: string, timeoutMs: number): Promise<unknown> {
  const answers: JsonObject[] = [];
  let wake = (): void => {};
  let ended: FsError | undefined;
  const next = async (withinMs: number): Promise<JsonObject> => {
    const deadline = Date.now() + withinMs;
    for (;;) {
      const answer = answers.shift();
      if (answer !== undefined) return answer;
      if (ended !== undefined) throw ended;
      const leftMs = deadline - Date.now();
      if (leftMs <= 0) throw new FsError('ETIMEDOUT', `the guest agent at '${path}' did not answer ${command}.`);
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, leftMs);
        wake = () => {
          clearTimeout(timer);
          resolve();
        };
      });
    }
  };
  const handlers = {
    message: (value: unknown) => {
      if (isObject(value)) answers.push(value);
      wake();
    },
    end: (reason: FsError) => {
      ended = reason;
      wake();
    },
  };

  const id = Math.floor(Math.random() * 2 ** 31);
  let connection: JsonSocket | undefined;
  try {
    connection = new JsonSocket({ path, peer: 'the guest agent', ...handlers });
    connection.send({ execute: 'guest-sync-delimited', arguments: { id } }, RESTART);
    while ((await next(SYNC_MS)).return !== id); // answers to what others asked before
  } catch (cause) {
    connection?.[Symbol.dispose]();
    throw new NoAgent('ENOTCONN', `no guest agent answers at '${path}'.`, { cause });
  }
  using synchronized = connection;
  synchronized.send({ execute: command });
  const answer = await next(timeoutMs);
  if ('return' in answer) return answer.return;
  const said = isObject(answer.error) ? answer.error.desc : answer;
  throw new FsError(
    'EIO',
    `the guest agent refused ${command}: ${typeof said === 'string' ? said : JSON.stringify(said)}.`,
  );
}
