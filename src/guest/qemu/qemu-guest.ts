/** A QEMU guest, by the QMP socket that it was given (`-qmp unix:SOCKET,server=on,wait=off`). */
import { basename, join } from 'node:path';
import debug from 'debug';
import { FsError } from '../../errors.ts';
import { runCommand } from '../../os/run-command.ts';
import type {
  AttachedCheckpoints,
  FrozenFileSystems,
  Guest,
  GuestIdentity,
  GuestStatus,
  RestoreCommand,
  RestoreRequest,
  SaveTarget,
  StateFile,
} from '../guest.ts';
import { agentSocket } from './agent-socket.ts';
import { attachedCheckpoints } from './attached.ts';
import { restoringArguments } from './command-line.ts';
import { freezeByAgent } from './guest-agent.ts';
import { asObject, asText, isObject } from './json-fields.ts';
import { letStateRun, migrateToFile, refuseIfMigrating } from './migration.ts';
import { validateStream } from './migration-stream.ts';
import { Monitor } from './monitor.ts';
import { processArguments } from './process.ts';
import { QmpClient } from './qmp-client.ts';
import { guestState, RUN_STATES } from './run-state.ts';
import { statistics } from './statistics.ts';

const log = debug('vdskfs:guest');

/** From `quit` to the end of the connection: QEMU closes its disks in between. */
const QUIT_MS = 30_000;

export interface QemuGuestOptions {
  readonly socketPath: string;
  /** The qcow2 image that QEMU itself has open; undefined where its disk is served by us. */
  readonly attachedImage?: string;
  /** Shared by all who talk to this socket: QEMU serves one client at a time. */
  readonly monitor?: Monitor;
}

export class QemuGuest implements Guest {
  readonly kind = 'qemu';
  readonly attached: AttachedCheckpoints | undefined;
  readonly #monitor: Monitor;
  /** The socket's file name until QEMU has told its own. */
  #name: string;

  constructor({ socketPath, attachedImage, monitor = new Monitor(socketPath) }: QemuGuestOptions) {
    this.#monitor = monitor;
    this.#name = basename(socketPath).replace(/\.(sock|socket|qmp)$/, '');
    this.attached = attachedImage === undefined ? undefined : attachedCheckpoints(this.#monitor, attachedImage);
  }

  get name(): string {
    return this.#name;
  }

  async status(): Promise<GuestStatus> {
    try {
      return await this.#monitor.use(async (qmp) => {
        await this.#learnName(qmp);
        return { alive: true, state: guestState(await runState(qmp)) };
      });
    } catch (error) {
      // A socket that somebody listens on has a QEMU, whatever that is busy with.
      const gone = error instanceof FsError && error.errno === 'ENOTCONN';
      return gone ? { alive: false, state: 'off' } : { alive: true, state: 'unknown' };
    }
  }

  identity(): Promise<GuestIdentity> {
    return this.#monitor.use(async (qmp) => {
      await this.#learnName(qmp);
      return {
        kind: this.kind,
        name: this.#name,
        version: qmp.version.text,
        hostRelease: undefined,
        argv: await processArguments(qmp.process),
      };
    });
  }

  async save({ directory, name, suspend, keep, signal }: SaveTarget): Promise<void> {
    const path = join(directory, name);
    await this.#monitor.use(async (qmp) => {
      await refuseIfMigrating(qmp);
      const before = await runState(qmp);
      refuseUnsavable(before);
      const running = guestState(before) === 'running';
      if (running) await qmp.execute('stop');
      try {
        await migrateToFile(qmp, path, signal);
        if (suspend) {
          // Before the end: until then a failure costs nothing.
          if (running) await letStateRun(path);
          await keep();
        }
      } catch (error) {
        if (running) await this.#letRun(qmp);
        throw error;
      }
      if (suspend) return await end(qmp);
      if (!running) return;
      await qmp.execute('cont');
      // The guest runs already: this is about the file alone.
      await letStateRun(path);
    });
  }

  validate(files: readonly StateFile[]): void {
    for (const file of files) validateStream(file);
  }

  async freezeFileSystems(): Promise<FrozenFileSystems | undefined> {
    let path: string | undefined;
    try {
      path = await this.#monitor.use(async (qmp) =>
        // An agent in a guest that stands still cannot answer.
        guestState(await runState(qmp)) === 'running' ? agentSocket(qmp) : undefined,
      );
    } catch (error) {
      log('guest %s: no agent was looked for: %o', this.#name, error);
    }
    return path === undefined ? undefined : freezeByAgent(path);
  }

  async restoreCommand({ statePath, diskPath, saved }: RestoreRequest): Promise<RestoreCommand> {
    const program = saved?.argv[0];
    const installed = program === undefined ? undefined : await installedVersion(program);
    const { argv, warnings } = restoringArguments(saved?.argv ?? [], { statePath, diskPath, version: installed });
    return { argv, warnings: [...versionWarnings(saved, program, installed?.text), ...warnings] };
  }

  pause(): Promise<string> {
    return this.#command('stop', 'the guest is paused');
  }

  resume(): Promise<string> {
    return this.#command('cont', 'the guest runs');
  }

  reset(): Promise<string> {
    return this.#command('system_reset', 'the machine is reset');
  }

  poweroff(): Promise<string> {
    return this.#monitor.use(async (qmp) => {
      await end(qmp);
      return 'QEMU has ended';
    });
  }

  nmi(): Promise<string> {
    return this.#command('inject-nmi', 'the interrupt is sent');
  }

  stats(): Promise<string> {
    return this.#monitor.use(statistics);
  }

  async forward(words: string): Promise<string> {
    const { execute, arguments: args } = qmpCommand(words);
    return this.#monitor.use(async (qmp) => JSON.stringify(await qmp.execute(execute, args)));
  }

  /** Connections end with those who use them. */
  [Symbol.dispose](): void {}

  #command(command: string, done: string): Promise<string> {
    return this.#monitor.use(async (qmp) => {
      await qmp.execute(command);
      return done;
    });
  }

  /** After a failure: by a new connection where this one is lost. A QEMU that is gone runs nothing. */
  async #letRun(qmp: QmpClient): Promise<void> {
    try {
      await qmp.execute('cont');
    } catch {
      await QmpClient.connect(this.#monitor.path).then(
        async (fresh) => {
          using client = fresh;
          await client.execute('cont');
        },
        () => {},
      );
    }
  }

  async #learnName(qmp: QmpClient): Promise<void> {
    const { name } = asObject(await qmp.execute('query-name'), 'query-name');
    if (typeof name === 'string' && name !== '') this.#name = name;
  }
}

async function runState(qmp: QmpClient): Promise<string> {
  return asText(asObject(await qmp.execute('query-status'), 'query-status').status, 'status');
}

/** @throws FsError EBUSY, EINVAL */
function refuseUnsavable(state: string): void {
  const reason = RUN_STATES[state]?.unsavable;
  if (reason !== undefined) throw new FsError(...reason);
}

/** Quit, and wait until QEMU has closed its disks. */
async function end(qmp: QmpClient): Promise<void> {
  // QEMU may be gone before its answer is here.
  const asked = qmp.execute('quit', {}, { timeoutMs: QUIT_MS }).catch((error) => {
    if (error.errno === 'ETIMEDOUT') throw error;
  });
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(
      () => reject(new FsError('ETIMEDOUT', `QEMU did not end within ${QUIT_MS} ms of quit.`)),
      QUIT_MS,
    );
  });
  await Promise.race([qmp.ended, late]).finally(() => clearTimeout(timer));
  await asked;
}

function qmpCommand(words: string): { execute: string; arguments: Readonly<Record<string, unknown>> } {
  const usage = 'A QEMU guest takes one QMP command as JSON, such as {"execute":"query-block"}';
  let command: unknown;
  try {
    command = JSON.parse(words);
  } catch (cause) {
    throw new FsError('EINVAL', `${usage}: ${(cause as Error).message}.`, { cause });
  }
  if (!isObject(command) || typeof command.execute !== 'string') throw new FsError('EINVAL', `${usage}.`);
  const args = command.arguments ?? {};
  if (!isObject(args)) throw new FsError('EINVAL', `${usage}: "arguments" is an object.`);
  return { execute: command.execute, arguments: args };
}

interface InstalledVersion {
  readonly major: number;
  readonly minor: number;
  readonly text: string;
}

/** What the program says of itself; undefined if it cannot be run, or says nothing of the kind. */
async function installedVersion(program: string): Promise<InstalledVersion | undefined> {
  const result = await runCommand({ program, args: ['--version'] }).catch(() => undefined);
  const found = /version ((\d+)\.(\d+)\.\d+(?: \(.*\))?)/.exec(result?.stdout ?? '');
  return found === null ? undefined : { text: found[1] as string, major: Number(found[2]), minor: Number(found[3]) };
}

function versionWarnings(
  saved: GuestIdentity | undefined,
  program: string | undefined,
  installed: string | undefined,
): string[] {
  if (saved === undefined || program === undefined) return [];
  if (installed === undefined) return [`'${program}', which the guest ran with, cannot be run here.`];
  if (installed === saved.version) return [];
  const sentence = `The state was saved by QEMU ${saved.version}; '${program}' is ${installed} now. It restores the state only if it knows the same machine type (-machine).`;
  return [sentence];
}
