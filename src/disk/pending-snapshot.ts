/** An internal checkpoint between its instant and its being seen. */
import { FsError } from '../errors.ts';
import type { Image } from '../qcow2/image.ts';
import type { SnapshotEntry } from '../qcow2/snapshot-table.ts';
import type { SnapshotList } from '../qcow2/snapshots.ts';
import { abandonSnapshot, type FrozenSnapshot, publishSnapshot } from '../qcow2/take-snapshot.ts';
import type { Checkpoint, CheckpointDetails, OpenState, PendingCheckpoint } from './disk.ts';

interface PendingFields {
  readonly name: string;
  readonly progress: (fraction: number) => void;
}

export class PendingSnapshot implements PendingCheckpoint {
  /** Resolves when it is published or abandoned. */
  readonly ended: Promise<void>;
  readonly #image: Image;
  readonly #list: SnapshotList;
  readonly #frozen: FrozenSnapshot;
  readonly #fields: PendingFields;
  /** Tells the disk of the new entry of its snapshot table. */
  readonly #published: (entry: SnapshotEntry) => Checkpoint;
  #end: () => void = () => {};
  #ending: Promise<unknown> | undefined;

  constructor(
    image: Image,
    list: SnapshotList,
    frozen: FrozenSnapshot,
    fields: PendingFields,
    published: (entry: SnapshotEntry) => Checkpoint,
  ) {
    this.#image = image;
    this.#list = list;
    this.#frozen = frozen;
    this.#fields = fields;
    this.#published = published;
    this.ended = new Promise((resolve) => {
      this.#end = resolve;
    });
  }

  createState(name: string): OpenState {
    throw new FsError('ENOTSUP', `a checkpoint cannot hold the guest's '${name}' yet`);
  }

  async publish(_details: CheckpointDetails): Promise<Checkpoint> {
    if (this.#ending !== undefined) throw new Error('the checkpoint was published or abandoned before');
    const { name, progress } = this.#fields;
    const run = async (): Promise<Checkpoint> => {
      try {
        return this.#published(await publishSnapshot(this.#image, this.#list, this.#frozen, { name }, progress));
      } catch (error) {
        await abandonSnapshot(this.#image, this.#frozen);
        throw error;
      } finally {
        this.#end();
      }
    };
    const running = run();
    this.#ending = running.catch(() => {});
    return running;
  }

  async abandon(): Promise<void> {
    this.#ending ??= abandonSnapshot(this.#image, this.#frozen).finally(this.#end);
    await this.#ending;
  }
}
