/**
 * Saving a guest's state: the request goes out by bhyvectl or through the control socket, and then the wait for its
 * end, which no generation of bhyve announces in the same way.
 */
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { FsError } from '../../errors.ts';
import type { SaveTarget } from '../guest.ts';
import { type BhyvectlTarget, bhyvectlFailure, controlArguments, tryBhyvectl } from './bhyvectl.ts';
import { type Answer, type ControlSocket, sendRequest } from './control-socket.ts';
import { checkPathLength } from './generation.ts';

/** What saving needs of a guest. */
export interface Saver {
  readonly guest: BhyvectlTarget;
  readonly runDirectory: string;
  /** Whether its process, or at least its socket, is there; true also if that cannot be found out just now. */
  isAlive(): Promise<boolean>;
  findSocket(): Promise<ControlSocket | undefined>;
}

/** How often a silent guest is looked at. */
const LOOK_MS = 500;
/** For what comes right behind something else: the last close behind the end of the connection, or the reverse. */
const GRACE_MS = 1000;
/** For a suspended guest's process to end, once its state is complete. */
const EXIT_MS = 10_000;

/** Resolves when the files are complete, as far as that can be told before they are looked at. */
export async function saveState(saver: Saver, target: SaveTarget): Promise<void> {
  target.signal.throwIfAborted();
  const route = await request(saver, target);
  await finished(saver, target, route);
}

/** Ends when bhyve has closed its end of the connection; undefined where there is none. */
type Route = { readonly answered: Promise<Answer> | undefined };

async function request(saver: Saver, target: SaveTarget): Promise<Route> {
  const control = await saver.findSocket();
  const [generation] = control?.generations ?? [];
  if (generation !== undefined) checkPathLength(generation, target);
  return (await requestByBhyvectl(saver, target)) ?? (await requestBySocket(saver, target, control));
}

/** Undefined if bhyvectl is not installed. Exit status 0 says no more than that the request was delivered. */
async function requestByBhyvectl({ guest }: Saver, target: SaveTarget): Promise<Route | undefined> {
  const option = target.suspend ? 'suspend' : 'checkpoint';
  const args = controlArguments(guest, [`--${option}=${join(target.directory, target.name)}`]);
  const result = await unlessAborted(tryBhyvectl(args), target);
  if (result === undefined) return undefined;
  if (result.status !== 0) {
    // A guest that suspends ends without an answer, which a bhyvectl that waits for one takes for a failure.
    if (!target.suspend || !(await hasStarted(target))) throw bhyvectlFailure(guest, args, result);
  }
  return { answered: undefined };
}

async function requestBySocket(saver: Saver, target: SaveTarget, control: ControlSocket | undefined): Promise<Route> {
  const { guest } = saver;
  if (control === undefined) {
    if (!(await saver.isAlive())) throw new FsError('ENOTCONN', `the guest '${guest.name}' does not run`);
    throw new FsError(
      'ENOTSUP',
      `the guest '${guest.name}' has no control socket in ${saver.runDirectory}: its bhyve was built without snapshots (WITH_BHYVE_SNAPSHOT); take the checkpoint without its memory (--no-memory)`,
    );
  }
  const last = control.generations.at(-1);
  for (const generation of control.generations) {
    const sent = await sendRequest(control.path, generation, target);
    if (generation === last || sent.answered === undefined) return sent;
    const refusal = await refusalOf(sent.answered, target);
    // One that gives reasons wants a descriptor at least: it is not asked without.
    if (refusal === undefined || (refusal.error !== undefined && generation === 'D')) return sent;
    if (!(await saver.isAlive())) return sent;
  }
  throw new Error('a control socket without a generation');
}

/**
 * The answer to a request of which nothing came: a dialect that bhyve does not speak is refused, mostly in silence, and
 * no file is there. Undefined once the guest has begun.
 */
async function refusalOf(answered: Promise<Answer>, target: SaveTarget): Promise<Answer | undefined> {
  for (;;) {
    const answer = await unlessAborted(Promise.race([answered, sleep(LOOK_MS)]), target);
    if (await hasStarted(target)) return undefined;
    if (answer !== undefined) return answer;
  }
}

/** Whether the guest has created a file yet. A folder that is gone has none. */
async function hasStarted({ directory }: SaveTarget): Promise<boolean> {
  return (await readdir(directory).catch(() => [])).length > 0;
}

/**
 * Wait for the end of a save. What tells it: bhyve closes the connection when it has finished (A, C, D, E), and all three
 * files have been closed (every generation). What ends the wait early: the process is gone, or the caller gives up.
 */
async function finished(saver: Saver, target: SaveTarget, { answered }: Route): Promise<void> {
  const closed = target.closed.then(() => 'closed' as const);
  const watch = new AbortController();
  let event: 'closed' | 'gone' | Answer;
  try {
    const events = [closed, gone(saver, watch.signal), ...(answered === undefined ? [] : [answered])];
    event = await unlessAborted(Promise.race(events), target);
  } finally {
    watch.abort();
  }

  const answer = event === 'closed' ? await soon(answered) : event === 'gone' ? undefined : event;
  if (answer?.error !== undefined) {
    throw new FsError('EIO', `the guest '${saver.guest.name}' could not save its state: ${answer.error}`);
  }
  if (!target.suspend && (event === 'gone' || !(await saver.isAlive()))) {
    throw new FsError('EIO', `the guest '${saver.guest.name}' ended while it saved its state`);
  }
  if (event !== 'closed') {
    if (!(await hasStarted(target))) {
      throw new FsError('EIO', `the guest '${saver.guest.name}' wrote no state: bhyve's standard error may say why`);
    }
    await soon(closed);
  }
  if (target.suspend) await ended(saver, target);
}

/** Resolves once the guest has been seen to be gone, until `stop` comes. */
async function gone(saver: Saver, stop: AbortSignal): Promise<'gone'> {
  while (!stop.aborted) {
    await sleep(LOOK_MS);
    if (!(await saver.isAlive())) return 'gone';
  }
  return new Promise(() => {});
}

async function ended(saver: Saver, target: SaveTarget): Promise<void> {
  for (const deadline = Date.now() + EXIT_MS; Date.now() < deadline; ) {
    if (!(await saver.isAlive())) return;
    await unlessAborted(sleep(LOOK_MS / 10), target);
  }
}

/** What `event` comes to if it comes right now, else undefined. */
const soon = <T>(event: Promise<T> | undefined): Promise<T | undefined> =>
  event === undefined ? Promise.resolve(undefined) : Promise.race([event, sleep(GRACE_MS).then(() => undefined)]);

/**
 * What `work` comes to, unless the caller gives up first; what was asked of the guest goes on by itself. A suspend is
 * not given up because someone loses patience: the guest would end with its state written nowhere.
 * @throws the signal's reason
 */
function unlessAborted<T>(work: Promise<T>, { signal, suspend }: SaveTarget): Promise<T> {
  return new Promise((resolve, reject) => {
    const abort = (): void => {
      if (!(suspend && signal.reason instanceof FsError && signal.reason.errno === 'EINTR')) reject(signal.reason);
    };
    if (signal.aborted) abort();
    else signal.addEventListener('abort', abort, { once: true });
    work.then(resolve, reject).finally(() => signal.removeEventListener('abort', abort));
  });
}
