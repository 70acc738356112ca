/** The open views of a disk's bytes, which go on when the layers under them change. */
import type { L1Table } from '../qcow2/lookup.ts';
import { HostFile } from '../storage/host-file.ts';
import type { SharedView } from './attach-contents.ts';
import { FileContents, LayerContents, LiveContents, SnapshotContents } from './contents.ts';
import type { Contents, OpenContents, SharedContents } from './disk.ts';
import type { Layer } from './layer.ts';

let lastId = 0;

/** Of contents that are shared with other threads: unique in this process. */
export const nextViewId = (): number => ++lastId;

/** A part of what a snapshot's table maps: its disk, or its VM state. In guest bytes. */
export interface SnapshotPart {
  readonly l1: L1Table;
  readonly base: number;
  readonly size: number;
}

/** A `SharedView` but for its id. */
type Description = SharedView extends infer V ? (V extends unknown ? Omit<V, 'id'> : never) : never;

class View implements OpenContents {
  readonly contents: Contents;
  readonly id = nextViewId();
  readonly #describe: () => Description;
  readonly #close: () => void;
  #shared: SharedContents;

  constructor(contents: Contents, describe: () => Description, close: () => void) {
    this.contents = contents;
    this.#describe = describe;
    this.#close = close;
    this.#shared = this.#made();
  }

  /** The same object until the layers change. */
  get shared(): SharedContents {
    return this.#shared;
  }

  follow(): void {
    this.#shared = this.#made();
  }

  #made(): SharedContents {
    return { id: this.id, ...this.#describe() };
  }

  [Symbol.dispose](): void {
    this.#close();
  }
}

export class Views {
  /** What each open view does when the layers have changed. */
  readonly #following = new Map<View, () => void>();

  /** The live disk. `active`: the layer that is written, at each moment. */
  live(active: () => Layer): OpenContents {
    const contents = new LiveContents(active().image);
    return this.#open(
      contents,
      () => ({ kind: 'live', chain: active().shared }),
      () => contents.follow(active().image),
    );
  }

  /** A snapshot in a layer. `closed` is called once. */
  snapshot(layer: Layer, { l1, base, size }: SnapshotPart, closed: () => void): OpenContents {
    const contents = new SnapshotContents(layer.image, l1, base, size);
    const { view, entries: l1Entries, diskBytes } = l1;
    const snapshot = { l1: view.buffer as SharedArrayBuffer, l1Entries, diskBytes, base, size };
    return this.#open(
      contents,
      () => ({ kind: 'snapshot', chain: layer.shared, snapshot }),
      () => contents.follow(layer.image),
      closed,
    );
  }

  /** A layer with all below it. `shown`: which one, at each moment. */
  layer(shown: () => Layer, closed: () => void): OpenContents {
    const contents = new LayerContents(shown().backing);
    return this.#open(
      contents,
      () => ({ kind: 'layer', chain: shown().shared }),
      () => contents.follow(shown().backing),
      closed,
    );
  }

  /** A host file as it is, through a descriptor of its own. @throws FsError ENOENT, … */
  file(path: string, closed: () => void): OpenContents {
    const file = HostFile.open(path, { readOnly: true });
    return this.#open(
      new FileContents(file),
      () => ({ kind: 'file', file: file.share() }),
      () => {},
      () => {
        file[Symbol.dispose]();
        closed();
      },
    );
  }

  /** The layers have changed: views of this thread follow at once, those of others when `shared` is attached anew. */
  follow(): void {
    for (const [view, follow] of this.#following) {
      follow();
      view.follow();
    }
  }

  #open(contents: Contents, describe: () => Description, follow: () => void, closed: () => void = () => {}): View {
    const view: View = new View(contents, describe, () => {
      if (this.#following.delete(view)) closed();
    });
    this.#following.set(view, follow);
    return view;
  }
}
