/** A guest that writes its state as bhyve does, in steps at which it can die, hang or talk nonsense. */
import { FsError } from '../../src/errors.ts';
import type { DirectoryNode, OpenFile } from '../../src/fuse/filesystem.ts';
import type {
  FrozenFileSystems,
  Guest,
  GuestIdentity,
  GuestState,
  RestoreCommand,
  RestoreRequest,
  SaveTarget,
  StateFile,
} from '../../src/guest/guest.ts';
import { caller, directoryAt, O_RDWR, O_WRONLY, open } from './walk.ts';

/** In the order in which bhyve takes them. */
export const steps = ['asked', 'opened', 'paused', 'memory', 'devices', 'resumed', 'closed'] as const;
export type Step = (typeof steps)[number] | 'ended';

export class FakeGuest implements Guest {
  readonly kind = 'bhyve';
  readonly name: string;
  readonly attached = undefined;
  /** Where the tree is, which the guest finds at its mount point. */
  root: DirectoryNode | undefined;
  alive = true;
  state: GuestState = 'running';
  memory = 'all that the guest remembers';
  /** What happens when a step has been taken. */
  readonly on = new Map<Step, (target: SaveTarget) => Promise<void> | void>();
  /** Answers of its agent; undefined without one. */
  agent: ('freeze' | 'thaw')[] | undefined;
  /** It ends for a suspend only when its checkpoint is kept, as QEMU does. */
  waits = false;
  invalid: FsError | undefined;
  disposed = 0;
  readonly log: string[] = [];

  constructor(name = 'vm1') {
    this.name = name;
  }

  async status() {
    return { alive: this.alive, state: this.alive ? this.state : ('off' as const) };
  }

  async identity(): Promise<GuestIdentity> {
    return { kind: 'bhyve', name: this.name, version: '14.1', hostRelease: '1401000', argv: ['bhyve', this.name] };
  }

  async save(target: SaveTarget): Promise<void> {
    const { root } = this;
    if (root === undefined) throw new Error('no tree');
    const path = target.directory.replace('/mnt/', '');
    const folder = await directoryAt(root, path);
    const files: OpenFile[] = [];
    const create = async (name: string): Promise<OpenFile> => {
      const made = await folder.createFile(name, O_RDWR, 0o700, caller);
      files.push(made.open);
      return made.open;
    };
    const write = (file: OpenFile, offset: number, text: string) =>
      file.write(offset, Buffer.from(text), false, caller);
    const step = async (name: Step) => {
      this.log.push(name);
      await this.on.get(name)?.(target);
    };
    try {
      await step('asked');
      const kern = await create(`${target.name}.kern`);
      const memory = await create(target.name);
      const meta = await create(`${target.name}.meta`);
      await step('opened');
      this.state = 'paused';
      await step('paused');
      const half = this.memory.length >> 1;
      await write(memory, half, this.memory.slice(half));
      await write(memory, 0, this.memory.slice(0, half));
      await step('memory');
      await write(kern, 0, 'devices');
      await write(meta, 0, '{}');
      await step('devices');
      if (!target.suspend) this.state = 'running';
      await step('resumed');
    } finally {
      for (const file of files) await file.release();
    }
    await step('closed');
    if (!target.suspend) return;
    if (this.waits) await this.#keep(target);
    await step('ended');
    this.alive = false;
  }

  async #keep(target: SaveTarget): Promise<void> {
    try {
      await target.keep();
    } catch (error) {
      this.state = 'running';
      throw error;
    }
  }

  validate(files: readonly StateFile[]): void {
    if (this.invalid !== undefined) throw this.invalid;
    for (const { name, bytes, read } of files) this.log.push(`${name} ${bytes} ${typeof read}`);
  }

  async freezeFileSystems(): Promise<FrozenFileSystems | undefined> {
    const { agent } = this;
    agent?.push('freeze');
    return agent && { thaw: async () => void agent.push('thaw') };
  }

  async restoreCommand({ statePath, diskPath, saved }: RestoreRequest): Promise<RestoreCommand> {
    return {
      argv: ['bhyve', '-r', statePath, '-s', `3,virtio-blk,${diskPath}`, this.name],
      warnings: saved ? [] : ['!'],
    };
  }

  pause = async () => '';
  resume = async () => '';
  reset = async () => '';
  poweroff = async () => '';
  stats = async () => 'exits: 7';
  forward = async (words: string) => `heard ${words}`;
  nmi = async (): Promise<string> => {
    throw new FsError('ENOTSUP', 'This bhyve knows no NMI.');
  };

  [Symbol.dispose](): void {
    this.disposed++;
  }
}

export { O_WRONLY, open };
