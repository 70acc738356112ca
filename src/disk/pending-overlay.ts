/** An external checkpoint between its instant and its being seen: its overlay is the live disk already. */
import { basename, dirname } from 'node:path';
import { FsError } from '../errors.ts';
import { HostFile } from '../storage/host-file.ts';
import type { Checkpoint, CheckpointDetails, OpenState, PendingCheckpoint } from './disk.ts';
import type { Layer } from './layer.ts';
import { STATE_NAMES, stateFileOf, syncFolder } from './overlay-files.ts';
import { StateFileContents } from './state-file.ts';
import { nextViewId } from './views.ts';

interface PendingEnds {
  readonly publish: (details: CheckpointDetails) => Checkpoint;
  /** Takes the overlay back, with its state files. */
  readonly abandon: () => Promise<void>;
}

interface StateFile {
  readonly file: HostFile;
  readonly contents: StateFileContents;
}

export class PendingOverlay implements PendingCheckpoint {
  /** Resolves when it is published or abandoned. */
  readonly ended: Promise<void>;
  readonly #overlay: Layer;
  readonly #ends: PendingEnds;
  readonly #states = new Map<string, StateFile>();
  #end: () => void = () => {};
  #ending: Promise<unknown> | undefined;

  constructor(overlay: Layer, ends: PendingEnds) {
    this.#overlay = overlay;
    this.#ends = ends;
    this.ended = new Promise((resolve) => {
      this.#end = resolve;
    });
  }

  createState(name: string): OpenState {
    if (!(STATE_NAMES as readonly string[]).includes(name)) {
      throw new FsError('EINVAL', `'${name}' is no file of guest state; there are ${STATE_NAMES.join(', ')}`);
    }
    const path = stateFileOf(this.#overlay.path, name);
    const file = HostFile.open(path, { readOnly: false, create: 'new' });
    const size = new SharedArrayBuffer(8);
    const contents = new StateFileContents(file, size);
    this.#states.set(basename(path), { file, contents });
    return {
      contents,
      shared: { id: nextViewId(), kind: 'state', state: { file: file.share(), size } },
      // The file stays open until the checkpoint has ended: it is not durable before.
      [Symbol.dispose]: () => {},
    };
  }

  async publish(details: CheckpointDetails): Promise<Checkpoint> {
    if (this.#ending !== undefined) throw new Error('the checkpoint was published or abandoned before');
    const run = async (): Promise<Checkpoint> => {
      try {
        for (const { contents } of this.#states.values()) contents.finish();
        if (this.#states.size > 0) syncFolder(dirname(this.#overlay.path));
        return this.#ends.publish(details);
      } catch (error) {
        await this.#takeBack();
        throw error;
      } finally {
        this.#close();
      }
    };
    const running = run();
    this.#ending = running.catch(() => {});
    return running;
  }

  async abandon(): Promise<void> {
    this.#ending ??= this.#takeBack().finally(() => this.#close());
    await this.#ending;
  }

  /** On a host that is full, merging needs the space that the state has taken. */
  async #takeBack(): Promise<void> {
    try {
      for (const { contents } of this.#states.values()) contents.setSize(0);
    } finally {
      await this.#ends.abandon();
    }
  }

  #close(): void {
    for (const { file } of this.#states.values()) file[Symbol.dispose]();
    this.#states.clear();
    this.#end();
  }
}
