/** The external checkpoints of a disk: overlays by name, and what is done to them. The disk runs one at a time. */
import { basename } from 'node:path';
import { FsError } from '../errors.ts';
import type { Checkpoint, CheckpointDetails, OpenContents } from './disk.ts';
import type { Layer } from './layer.ts';
import type { LayerTree } from './layer-tree.ts';
import { createOverlay, forgetElsewhere, isEmpty, reopenForWriting, switchLayer } from './overlay.ts';
import {
  diskNameOf,
  freeOverlayPath,
  pointNameOf,
  removeOverlayFiles,
  stateFileOf,
  stateFilesOf,
  validateOverlayName,
} from './overlay-files.ts';
import { writeMark } from './overlay-mark.ts';
import { PendingOverlay } from './pending-overlay.ts';
import type { Views } from './views.ts';

/** An external checkpoint: what the layer below its overlay shows. */
interface Point {
  overlay: Layer;
  checkpoint: Checkpoint;
  /** Open views of its files. */
  pins: number;
}

export interface OverlaysHost {
  readonly tree: LayerTree;
  readonly views: Views;
  /** Views of all threads follow the layers from now on; resolves when no thread uses what they showed before. */
  relinked(): Promise<void>;
}

export class Overlays {
  readonly #host: OverlaysHost;
  readonly #diskName: string;
  #points: readonly Point[] = [];

  constructor(host: OverlaysHost) {
    this.#host = host;
    this.#diskName = diskNameOf(host.tree.bottom.path);
    this.relist();
  }

  /** In the order in which they were taken. */
  get checkpoints(): readonly Checkpoint[] {
    return this.#points.map(({ checkpoint }) => checkpoint);
  }

  /** Make the list follow the layers, with the same objects for what did not change. */
  relist(): void {
    const known = new Map(this.#points.map((point) => [point.overlay, point]));
    const names = new Set<string>();
    this.#points = this.#host.tree.overlays.flatMap((overlay) => {
      const name = overlay.mark?.pending === true ? undefined : pointNameOf(this.#diskName, overlay.name);
      if (name === undefined) return [];
      // Two folders may hold files of one name.
      let shown = name;
      for (let number = 2; names.has(shown); number++) shown = `${name}~${number}`;
      names.add(shown);
      const checkpoint = describePoint(overlay, shown, name);
      const point = known.get(overlay);
      if (point === undefined) return [{ overlay, checkpoint, pins: 0 }];
      if (JSON.stringify(point.checkpoint) !== JSON.stringify(checkpoint)) point.checkpoint = checkpoint;
      return [point];
    });
  }

  /** Host bytes of the layers that a point shows. */
  allocatedBytes(checkpoint: Checkpoint): number {
    const layers = this.#point(checkpoint).overlay.below?.chain ?? [];
    return layers.reduce((sum, { file }) => sum + file.allocatedBytes(), 0);
  }

  open(checkpoint: Checkpoint): OpenContents {
    const point = this.#point(checkpoint);
    if (point.overlay.mark?.merging === true) {
      throw new FsError(
        'EBUSY',
        `checkpoint '${checkpoint.name}' is being merged away: delete it once more to finish that`,
      );
    }
    return this.#host.views.layer(() => shownBy(point.overlay), this.#pin(point));
  }

  /** The layer that was made for it. @throws FsError ENOENT */
  overlayOf(checkpoint: Checkpoint): Layer {
    return this.#point(checkpoint).overlay;
  }

  openOverlay(checkpoint: Checkpoint): OpenContents {
    const point = this.#point(checkpoint);
    return this.#host.views.file(point.overlay.path, this.#pin(point));
  }

  openState(checkpoint: Checkpoint, name: string): OpenContents {
    const point = this.#point(checkpoint);
    if (!checkpoint.stateFiles.some((file) => file.name === name)) {
      throw new FsError('ENOENT', `checkpoint '${checkpoint.name}' has no file '${name}'`);
    }
    return this.#host.views.file(stateFileOf(point.overlay.path, name), this.#pin(point));
  }

  details(checkpoint: Checkpoint): CheckpointDetails {
    return this.#point(checkpoint).overlay.mark?.details ?? { consistency: checkpoint.consistency };
  }

  /** @throws FsError EEXIST, EINVAL, ENAMETOOLONG */
  checkName(name: string, except?: Checkpoint): void {
    validateOverlayName(name);
    if (this.checkpoints.some((other) => other !== except && other.name === name)) {
      throw new FsError('EEXIST', `'${this.#diskName}' has an overlay '${name}' already; choose another name`);
    }
  }

  /** The instant of a checkpoint: the disk goes on in a fresh overlay. @throws FsError with nothing changed */
  async freeze(name: string, published: () => void): Promise<PendingOverlay> {
    this.checkName(name);
    const { tree } = this.#host;
    const before = tree.active;
    const path = freeOverlayPath(tree.overlayFolder, this.#diskName, name);
    const overlay = createOverlay(path, before, {
      size: before.virtualSize,
      cacheBytes: tree.options.cacheBytes,
      mark: {
        sequence: tree.nextSequence,
        pending: true,
        kept: false,
        merging: false,
        bottom: false,
        createdMs: Date.now(),
        details: { consistency: 'crash' },
        takesName: '',
      },
    });
    try {
      await this.#goOnIn(overlay, () => {});
    } catch (error) {
      overlay[Symbol.dispose]();
      this.#removeFiles(overlay);
      throw error;
    }
    return new PendingOverlay(overlay, {
      publish: (details) => {
        const checkpoint = this.#publish(overlay, details);
        published();
        return checkpoint;
      },
      abandon: () => this.#abandon(overlay),
    });
  }

  #publish(overlay: Layer, details: CheckpointDetails): Checkpoint {
    const { mark } = overlay;
    if (mark === undefined) throw new Error(`${overlay.path} lost its mark`);
    overlay.mark = { ...mark, pending: false, details };
    writeMark(overlay.file, overlay.mark);
    this.relist();
    return this.#points.find((point) => point.overlay === overlay)?.checkpoint as Checkpoint;
  }

  /** Take the overlay back. The checkpoint was never seen. */
  async #abandon(overlay: Layer): Promise<void> {
    const { tree } = this.#host;
    const below = shownBy(overlay);
    // What the guest wrote since stays; no checkpoint is made of it.
    if (tree.active !== overlay || !isEmpty(overlay)) return;
    reopenForWriting(below, tree.options.cacheBytes);
    await this.#goOnIn(below, () => this.#removeFiles(overlay));
    tree.remove(overlay);
  }

  /**
   * Let the disk go on in `next`, another name for what it holds. `commit` makes the files say so, while nobody writes.
   * Resolves when no thread uses the layers as they were.
   */
  #goOnIn(next: Layer, commit: () => void): Promise<void> {
    const { tree, views } = this.#host;
    let relinked = Promise.resolve();
    switchLayer(tree.active, next, commit, () => {
      tree.add(next);
      tree.activate(next);
      views.follow();
      relinked = this.#host.relinked();
    });
    return relinked;
  }

  #removeFiles(overlay: Layer): void {
    forgetElsewhere(shownBy(overlay), overlay.path);
    removeOverlayFiles(overlay.path);
  }

  #point(checkpoint: Checkpoint): Point {
    const point = this.#points.find((one) => one.checkpoint === checkpoint);
    if (point === undefined) throw new FsError('ENOENT', `checkpoint '${checkpoint.name}' is there no more`);
    return point;
  }

  #pin(point: Point): () => void {
    point.pins++;
    return () => {
      point.pins--;
    };
  }
}

/** The layer whose contents the checkpoint of an overlay shows. */
function shownBy(overlay: Layer): Layer {
  if (overlay.below === undefined) throw new Error(`${overlay.path} stands on nothing`);
  return overlay.below;
}

function describePoint(overlay: Layer, name: string, realName: string): Checkpoint {
  const stateFiles = stateFilesOf(overlay.path);
  const { mark } = overlay;
  const shown = shownBy(overlay);
  return {
    kind: 'external',
    name,
    realName,
    id: overlay.path,
    createdMs: mark?.createdMs ?? 0,
    virtualSize: shown.virtualSize,
    vmStateSize: stateFiles.reduce((sum, { bytes }) => sum + bytes, 0),
    vmClockNs: 0,
    layer: basename(shown.path),
    consistency: mark?.details.consistency ?? 'crash',
    stateFiles,
  };
}
