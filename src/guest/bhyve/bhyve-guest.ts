/** A guest that stock bhyve runs on a disk which vdskfs serves, or that a bhyve with libvdsk runs on the image itself. */
import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { FsError } from '../../errors.ts';
import { processes, processOf } from '../../os/process-list.ts';
import type {
  AttachedCheckpoints,
  Guest,
  GuestIdentity,
  GuestStatus,
  RestoreCommand,
  RestoreRequest,
  SaveTarget,
  StateFile,
} from '../guest.ts';
import { attachedCheckpoints } from './attached.ts';
import { type BhyvectlTarget, bhyvectl, controlArguments } from './bhyvectl.ts';
import { type ControlSocket, DEFAULT_RUN_DIRECTORY, findControlSocket } from './control-socket.ts';
import { readGuestConfig } from './guest-config.ts';
import { findGuestProcess, type GuestProcess } from './guest-process.ts';
import { BhyveHost } from './release.ts';
import { composeRestoreCommand } from './restore-command.ts';
import { saveState } from './saving.ts';
import { validateStateFiles } from './state-files.ts';

export interface BhyveOptions {
  /** The VM's. */
  readonly name: string;
  /** Where bhyve keeps its control sockets (`bhyve -o rundir=`), if not in /var/run/bhyve. */
  readonly runDirectory?: string | undefined;
  /** `--guest-config`: a file with the guest's command line, or one of bhyve_config(5). */
  readonly configFile?: string | undefined;
  /** Its own process holds the qcow2 image. */
  readonly attached?: boolean;
  /** Where it runs; one object for all guests saves asking for each. */
  readonly host?: BhyveHost;
}

/** Sets the folder of the control sockets for a whole process, where no option does. */
const RUN_DIRECTORY_VARIABLE = 'VDSKFS_BHYVE_RUNDIR';

const isGuestName = (name: string): boolean => name !== '' && !/[/\0]/.test(name);

/** @throws FsError EINVAL if no VM can have that name */
export function openBhyveGuest(options: BhyveOptions): Guest {
  const { name } = options;
  if (!isGuestName(name)) throw new FsError('EINVAL', `no bhyve guest can be called '${name}'`);
  return new BhyveGuest(options);
}

/**
 * Whether a VM of that name is there: its control socket or its device, without which no process is looked for. A dead
 * guest's socket does not count. Cheap where there is no bhyve: asked before each checkpoint of a disk without a guest.
 */
export async function bhyveGuestExists(options: BhyveOptions): Promise<boolean> {
  const { name } = options;
  if (!isGuestName(name)) return false;
  const directory = runDirectoryOf(options);
  const device = join('/dev/vmm', name);
  const [hasDevice, ...hasSocket] = await Promise.all(
    [device, join(directory, name), join(directory, 'checkpoint', name)].map(isThere),
  );
  if (hasDevice === true) return true;
  return hasSocket.includes(true) && (await new BhyveGuest(options).status()).alive;
}

const isThere = (path: string): Promise<boolean> =>
  stat(path).then(
    () => true,
    () => false,
  );

const runDirectoryOf = ({ runDirectory }: BhyveOptions): string =>
  runDirectory ?? process.env[RUN_DIRECTORY_VARIABLE] ?? DEFAULT_RUN_DIRECTORY;

class BhyveGuest implements Guest {
  readonly kind = 'bhyve';
  readonly name: string;
  readonly attached: AttachedCheckpoints | undefined;
  readonly #runDirectory: string;
  readonly #configFile: string | undefined;
  readonly #target: BhyvectlTarget;
  readonly #host: BhyveHost;
  #saving = false;

  constructor(options: BhyveOptions) {
    const { name, configFile, attached = false, host = new BhyveHost() } = options;
    this.name = name;
    this.#runDirectory = runDirectoryOf(options);
    this.#configFile = configFile;
    this.#host = host;
    const usual = this.#runDirectory === DEFAULT_RUN_DIRECTORY;
    this.#target = { name, runDirectory: usual ? undefined : this.#runDirectory };
    this.attached = attached ? attachedCheckpoints(this.#target) : undefined;
  }

  async status(): Promise<GuestStatus> {
    const alive = await this.#isAlive().catch(() => undefined);
    if (alive === undefined) return { alive: false, state: 'unknown' };
    return { alive, state: alive ? 'running' : 'off' };
  }

  async identity(): Promise<GuestIdentity> {
    const [running, version, release, configured] = await Promise.all([
      this.#process(),
      this.#host.version(),
      this.#host.osreldate(),
      this.#configured(),
    ]);
    const shown = running?.argv ?? [];
    return {
      kind: 'bhyve',
      name: this.name,
      version,
      hostRelease: release === undefined ? undefined : String(release),
      argv: shown.length > 0 ? shown : (configured ?? []),
    };
  }

  async save(target: SaveTarget): Promise<void> {
    if (this.#saving) throw new FsError('EBUSY', `the guest '${this.name}' is saving its state already`);
    this.#saving = true;
    try {
      const running = await this.#process();
      await saveState(
        {
          guest: this.#target,
          runDirectory: this.#runDirectory,
          findSocket: () => this.#socket(),
          isAlive: () => (running === undefined ? this.#isAlive() : this.#isStill(running)).catch(() => true),
        },
        target,
      );
    } finally {
      this.#saving = false;
    }
  }

  validate(files: readonly StateFile[]): void {
    validateStateFiles(files);
  }

  /** bhyve has no channel to an agent in the guest. */
  freezeFileSystems(): Promise<undefined> {
    return Promise.resolve(undefined);
  }

  async restoreCommand(request: RestoreRequest): Promise<RestoreCommand> {
    const [version, release, configured] = await Promise.all([
      this.#host.version(),
      this.#host.osreldate(),
      this.#configured(),
    ]);
    return composeRestoreCommand(request, { name: this.name, version, osreldate: release, configured });
  }

  pause(): Promise<string> {
    return Promise.reject(this.#lacks('be paused'));
  }

  resume(): Promise<string> {
    return Promise.reject(this.#lacks('be resumed'));
  }

  reset(): Promise<string> {
    return this.#bhyvectl('--force-reset');
  }

  poweroff(): Promise<string> {
    return this.#bhyvectl('--force-poweroff');
  }

  nmi(): Promise<string> {
    return this.#bhyvectl('--inject-nmi');
  }

  stats(): Promise<string> {
    return this.#bhyvectl('--get-stats');
  }

  async forward(words: string): Promise<string> {
    const given = words.split(/\s+/).filter((word) => word !== '');
    if (given.length === 0) throw new FsError('EINVAL', 'what is bhyvectl to do? As in: guest --get-stats');
    return this.#bhyvectl(...given);
  }

  /** Nothing is held between calls. */
  [Symbol.dispose](): void {}

  #bhyvectl(...words: string[]): Promise<string> {
    return bhyvectl(this.#target, controlArguments(this.#target, words));
  }

  #lacks(what: string): FsError {
    return new FsError(
      'ENOTSUP',
      `a bhyve guest cannot ${what}: bhyve has no command for it (suspend NAME saves and ends it)`,
    );
  }

  async #configured(): Promise<string[] | undefined> {
    return this.#configFile === undefined ? undefined : readGuestConfig(this.#configFile, this.name);
  }

  async #socket(): Promise<ControlSocket | undefined> {
    return findControlSocket(this.#runDirectory, this.name, await this.#host.osreldate());
  }

  async #process(): Promise<GuestProcess | undefined> {
    return findGuestProcess(await processes(), this.name);
  }

  async #isAlive(): Promise<boolean> {
    return (await this.#socket()) !== undefined || (await this.#process()) !== undefined;
  }

  /** The very process, not one that was started meanwhile. */
  async #isStill({ pid }: GuestProcess): Promise<boolean> {
    const found = await processOf(pid);
    return found !== undefined && findGuestProcess([found], this.name) !== undefined;
  }
}
