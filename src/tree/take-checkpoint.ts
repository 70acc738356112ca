/**
 * Taking a checkpoint of all disks of a machine at one instant: with the memory of its guest where one runs, else of
 * the disks alone. It is there on all of them, or no trace of it on any.
 */
import debug from 'debug';
import { validateNewName } from '../disk/checkpoint-name.ts';
import type { Checkpoint, CheckpointDetails, CheckpointKind, PendingCheckpoint } from '../disk/disk.ts';
import { FsError } from '../errors.ts';
import type { FrozenFileSystems, Guest } from '../guest/guest.ts';
import { expectedStateBytes } from './expected-state.ts';
import type { Machine } from './machine.ts';
import type { MountedDisk } from './mounted-disk.ts';
import { MEMORY_FILE, STATE_FILES } from './state-folder.ts';

const log = debug('vdskfs:tree');

export interface TakeRequest {
  /** Keeps the memory. */
  readonly disk: MountedDisk;
  readonly kind: CheckpointKind;
  readonly name: string;
  /** Leave the memory of a running guest out. */
  readonly withoutMemory: boolean;
  /** The guest ends when its state is kept. */
  readonly suspend: boolean;
  /** Who asked waits no more. */
  readonly signal: AbortSignal;
}

/** After giving up, how long the guest may take to hear of it and run on. */
const LET_GO_MS = 5000;

/** How long the kernel may take to tell of the end of files that the guest has closed. */
const CLOSING_MS = 5000;

/** @throws FsError EEXIST, EINVAL, ENAMETOOLONG, EROFS; ETIMEDOUT, EIO, EINTR with nothing changed; the disks' own */
export function takeCheckpoint(machine: Machine, request: TakeRequest): Promise<Checkpoint> {
  return machine.inTurn(request.signal, async () => {
    validateNewName(request.name);
    for (const { disk } of machine.disks) await disk.refresh('checkpoints');
    for (const disk of machine.disks) disk.refuseNewName(request.kind, request.name);
    return machine.withGuest((guest) => takeOf(machine, guest, request));
  });
}

async function takeOf(machine: Machine, guest: Guest | undefined, request: TakeRequest): Promise<Checkpoint> {
  if (machine.disks.some(({ disk }) => disk.owner === 'attached')) return takeAttached(machine, guest, request);
  const { alive, name } = await machine.statusOf(guest);
  if (guest !== undefined && alive) {
    return request.withoutMemory ? takeOfRunning(machine, guest, request) : takeWithMemory(machine, guest, request);
  }
  if (request.suspend) {
    throw name === undefined
      ? new FsError('ENOTSUP', `suspend is for guests: the disk ${request.disk.disk.name} has no guest.`)
      : new FsError('ENOTCONN', `Guest ${name} does not run: there is nothing to suspend; take a checkpoint instead.`);
  }
  return takeOfDisks(machine, request, 'crash');
}

/**
 * The guest holds the images, takes the checkpoint itself, and keeps of its memory what it is made to keep. Whether it can
 * be asked shows when it is.
 */
async function takeAttached(machine: Machine, guest: Guest | undefined, request: TakeRequest): Promise<Checkpoint> {
  const { disk: asked, kind, name, suspend } = request;
  const served = machine.disks.find(({ disk }) => disk.owner === 'served');
  if (served !== undefined) {
    throw new FsError('ENOTSUP', `The guest holds some of its images itself, but not that of ${served.disk.name}.`);
  }
  if (suspend)
    throw new FsError('ENOTSUP', 'suspend is for guests whose disk is served: this one holds its image itself.');
  // bhyve takes it of all its disks at once. QEMU does of one after the other: it stands still meanwhile.
  if (guest?.kind !== 'qemu' || machine.disks.length === 1) return asked.disk.takeCheckpoint(name, { kind });
  const taken = new Map<MountedDisk, Checkpoint>();
  const running = (await guest.status()).state === 'running';
  if (running) await guest.pause();
  try {
    for (const mounted of machine.disks) taken.set(mounted, await mounted.disk.takeCheckpoint(name, { kind }));
  } catch (error) {
    await deleteAll(taken);
    throw error;
  } finally {
    if (running) await guest.resume();
  }
  return taken.get(asked) as Checkpoint;
}

/** No guest runs, or nothing of it is wanted. */
async function takeOfDisks(
  machine: Machine,
  request: TakeRequest,
  consistency: 'crash' | 'frozen',
): Promise<Checkpoint> {
  const { disk, kind, name } = request;
  if (machine.disks.length === 1) return disk.disk.takeCheckpoint(name, { kind, consistency });
  const pending = await freezeAll(machine.disks, kind, name);
  return publishAll(pending, request, () => ({ consistency }));
}

/** The disks of a running guest, with its file systems standing still if it has someone who does that. */
async function takeOfRunning(machine: Machine, guest: Guest, request: TakeRequest): Promise<Checkpoint> {
  const still = await guest.freezeFileSystems();
  let pending: Map<MountedDisk, PendingCheckpoint>;
  try {
    pending = await freezeAll(machine.disks, request.kind, request.name);
  } catch (error) {
    await thaw(guest, still);
    throw error;
  }
  await thaw(guest, still);
  return publishAll(pending, request, () => ({ consistency: still === undefined ? 'crash' : 'frozen' }));
}

/** The checkpoint stands whether or not the guest could be told to go on; that it could not is worth a line. */
async function thaw(guest: Guest, still: FrozenFileSystems | undefined): Promise<void> {
  await still?.thaw().catch((error) => log('guest %s: its file systems may stand still: %o', guest.name, error));
}

async function takeWithMemory(machine: Machine, guest: Guest, request: TakeRequest): Promise<Checkpoint> {
  const { disk, kind, name, suspend } = request;
  let frozen: Map<MountedDisk, PendingCheckpoint> | undefined;
  const giveUp = new AbortController();
  using folder = disk.incoming.begin({
    freeze: async () => {
      frozen = await freezeAll(machine.disks, kind, name);
    },
    create: (file) => pendingOf(frozen, disk).createState(file),
    failed: (error) => giveUp.abort(error),
  });
  let expected: number | undefined;
  machine.operation = () => ({
    name: operationName(request),
    // The rest is what the publishing takes.
    progress: expected ? Math.min(folder.bytes / expected, 0.99) : 0,
  });
  // A signal such as SIGCHLD interrupts too, and a guest that was asked to end will end.
  using _interrupt = suspend ? undefined : relay(request.signal, giveUp);
  const late = setTimeout(() => giveUp.abort(timedOut(machine, guest)), machine.timeoutMs);
  let saving: Promise<void> | undefined;
  let kept: Promise<Checkpoint> | undefined;
  let isKept = false;
  try {
    const identity = await orAbort(guest.identity(), giveUp.signal);
    const known = machine.disks.flatMap((one) => one.disk.checkpoints());
    expected = expectedStateBytes(known, identity.argv);
    for (const one of machine.disks) await orAbort(one.disk.prepareFreeze(), giveUp.signal);
    const keep = async (): Promise<Checkpoint> => {
      // Until all of it is there and nobody can change it any more.
      await orAbort(within(folder.closed([MEMORY_FILE]), CLOSING_MS), giveUp.signal);
      folder.seal();
      guest.validate(folder.readable());
      if (frozen === undefined) throw new FsError('EIO', `Guest ${guest.name} wrote no memory.`);
      giveUp.signal.throwIfAborted();
      // From here on it is not the guest's time that passes.
      clearTimeout(late);
      const pending = frozen;
      frozen = undefined;
      const details = (of: MountedDisk): CheckpointDetails => ({
        consistency: of === disk ? 'memory' : 'crash',
        guest: identity,
      });
      const checkpoint = await publishAll(pending, request, details);
      isKept = true;
      return checkpoint;
    };
    saving = guest.save({
      directory: `${machine.mountpoint}/${disk.disk.name}/.incoming/${folder.name}`,
      name: MEMORY_FILE,
      suspend,
      closed: folder.closed(STATE_FILES),
      keep: async () => {
        kept ??= keep();
        await kept;
      },
      signal: giveUp.signal,
    });
    await orAbort(saving, giveUp.signal);
    kept ??= keep();
    return await kept;
  } catch (error) {
    folder.seal();
    await folder.quiet();
    if (frozen !== undefined) await abandonAll(frozen);
    // Only now the guest hears of what was not written, and runs on; whoever asked it to write sees to that.
    folder[Symbol.dispose]();
    await within(saving?.catch(() => {}) ?? Promise.resolve(), LET_GO_MS);
    if (isKept) throw new FsError('EIO', `"${name}" is taken, but guest ${guest.name} did not end.`, { cause: error });
    // What the guest says of it may be no more than that a write failed.
    throw folder.failure ?? error;
  } finally {
    clearTimeout(late);
    machine.operation = undefined;
  }
}

/** As the command that does the same is called. */
const operationName = ({ suspend, kind, name }: TakeRequest): string =>
  `${suspend ? 'suspend' : kind === 'internal' ? 'checkpoint' : 'ext-checkpoint'} ${name}`;

/** One instant for all: no write of any of them falls between the first and the last. */
async function freezeAll(
  disks: readonly MountedDisk[],
  kind: CheckpointKind,
  name: string,
): Promise<Map<MountedDisk, PendingCheckpoint>> {
  const frozen = new Map<MountedDisk, PendingCheckpoint>();
  const holds: AsyncDisposable[] = [];
  try {
    if (disks.length > 1) for (const { disk } of disks) await disk.prepareFreeze();
    if (disks.length > 1) for (const { disk } of disks) holds.push(await disk.holdWrites());
    for (const mounted of disks) frozen.set(mounted, await mounted.disk.freeze(kind, name));
    return frozen;
  } catch (error) {
    await abandonAll(frozen);
    throw error;
  } finally {
    for (const hold of holds) await hold[Symbol.asyncDispose]();
  }
}

/** The disk that was asked comes last: when it has the checkpoint, all have it. */
async function publishAll(
  pending: ReadonlyMap<MountedDisk, PendingCheckpoint>,
  { disk: asked }: TakeRequest,
  details: (disk: MountedDisk) => CheckpointDetails,
): Promise<Checkpoint> {
  const left = new Map(pending);
  const published = new Map<MountedDisk, Checkpoint>();
  try {
    for (const mounted of [...[...pending.keys()].filter((other) => other !== asked), asked]) {
      const checkpoint = pendingOf(left, mounted);
      left.delete(mounted); // a failure abandons it
      published.set(mounted, await checkpoint.publish(details(mounted)));
    }
    return published.get(asked) as Checkpoint;
  } catch (error) {
    await abandonAll(left);
    await deleteAll(published);
    throw error;
  }
}

async function deleteAll(taken: ReadonlyMap<MountedDisk, Checkpoint>): Promise<void> {
  for (const [{ disk }, checkpoint] of taken) {
    await disk
      .deleteCheckpoint(checkpoint)
      .catch((error) => log('%s: %s stays: %o', disk.name, checkpoint.name, error));
  }
}

async function abandonAll(pending: ReadonlyMap<MountedDisk, PendingCheckpoint>): Promise<void> {
  for (const [{ disk }, checkpoint] of pending) {
    await checkpoint
      .abandon()
      .catch((error) => log('%s: what was frozen stays until it is mounted anew: %o', disk.name, error));
  }
}

function pendingOf(
  pending: ReadonlyMap<MountedDisk, PendingCheckpoint> | undefined,
  disk: MountedDisk,
): PendingCheckpoint {
  const found = pending?.get(disk);
  if (found === undefined) throw new Error(`${disk.disk.name} was not frozen`);
  return found;
}

const timedOut = ({ timeoutMs }: Machine, { name }: Guest): FsError =>
  new FsError(
    'ETIMEDOUT',
    `Guest ${name} has not written its state within ${timeoutMs / 1000} s: it hangs, or needs a longer --guest-timeout.`,
  );

function relay(from: AbortSignal, to: AbortController): Disposable {
  const abort = () => to.abort(from.reason);
  if (from.aborted) abort();
  from.addEventListener('abort', abort);
  return { [Symbol.dispose]: () => from.removeEventListener('abort', abort) };
}

/** What `work` gives, unless `signal` aborts before; `work` goes on then, unheard. */
function orAbort<T>(work: Promise<T>, signal: AbortSignal): Promise<T> {
  return new Promise((resolve, reject) => {
    const abort = () => reject(signal.reason);
    if (signal.aborted) abort();
    signal.addEventListener('abort', abort, { once: true });
    work.then(resolve, reject).finally(() => signal.removeEventListener('abort', abort));
  });
}

/** Resolves with `work`, or after `ms` without it. */
function within(work: Promise<unknown>, ms: number): Promise<void> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    work.then(() => resolve(), reject).finally(() => clearTimeout(timer));
  });
}
