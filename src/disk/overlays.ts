/** The external checkpoints of a disk: overlays by name, and what is done to them. The disk runs one at a time. */
import { basename, dirname } from 'node:path';
import { FsError } from '../errors.ts';
import { closeImage } from '../qcow2/open-image.ts';
import type { StepOptions } from '../qcow2/steps.ts';
import { lockImage } from '../storage/image-lock.ts';
import type { Checkpoint, CheckpointDetails, OpenContents } from './disk.ts';
import type { Layer } from './layer.ts';
import { type LayersHost, mergeLayers } from './merge-layers.ts';
import { MAX_DEPTH } from './open-chain.ts';
import { createOverlay, forgetElsewhere, isEmpty, rememberElsewhere, standOn, switchLayer } from './overlay.ts';
import {
  addName,
  diskNameOf,
  freeOverlayPath,
  freeUnnamedPath,
  pointNameOf,
  removeOverlayFiles,
  renameStateFiles,
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

export interface OverlaysHost extends LayersHost {
  readonly views: Views;
}

/** What the disk held when it was rolled back to an earlier external checkpoint. */
const BEFORE_ROLLBACK = 'before-rollback';

export class Overlays {
  readonly #host: OverlaysHost;
  readonly #diskName: string;
  #points: readonly Point[] = [];
  /** Layers that cannot be merged for a reason that lasts. */
  readonly #stuck = new Set<Layer>();

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
    // A merge may put another file behind a name.
    const byName = new Map(this.#points.map((point) => [point.checkpoint.name, point]));
    const { layers } = this.#host.tree;
    const names = new Set<string>();
    this.#points = this.#host.tree.overlays.flatMap((overlay) => {
      const name = overlay.mark?.pending === true ? undefined : pointNameOf(this.#diskName, overlay.name);
      if (name === undefined) return [];
      // Two folders may hold files of one name.
      let shown = name;
      for (let number = 2; names.has(shown); number++) shown = `${name}~${number}`;
      names.add(shown);
      const checkpoint = describePoint(overlay, shown, name);
      const named = byName.get(shown);
      const point = named !== undefined && !layers.has(named.overlay) ? named : known.get(overlay);
      if (point === undefined) return [{ overlay, checkpoint, pins: 0 }];
      point.overlay = overlay;
      if (JSON.stringify(point.checkpoint) !== JSON.stringify(checkpoint)) point.checkpoint = checkpoint;
      return [point];
    });
  }

  /** Host bytes of the layers that a point shows. */
  allocatedBytes(checkpoint: Checkpoint): number {
    const layers = this.#point(checkpoint).overlay.below?.chain ?? [];
    return layers.reduce((sum, { hostBytes }) => sum + hostBytes, 0);
  }

  open(checkpoint: Checkpoint): OpenContents {
    const point = this.#point(checkpoint);
    if (point.overlay.mark?.merging === true) throw this.#merging(checkpoint);
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
    const path = freeOverlayPath(tree.overlayFolder, this.#diskName, name);
    const overlay = this.#create(path, tree.active, { pending: true });
    try {
      await this.#goOnIn(overlay, () => {});
    } catch (error) {
      this.#drop(overlay);
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

  /**
   * Delete a checkpoint: the layers that only it held apart become one; where others stand on what it shows, it loses its
   * name; the end of a branch that the disk has left goes with all it has.
   * @throws FsError EBUSY, EINTR, ENOSPC
   */
  async delete(checkpoint: Checkpoint, options: StepOptions): Promise<void> {
    const point = this.#unused(checkpoint);
    const { overlay } = point;
    await this.#remove(overlay, options);
    await this.#tidy(options);
  }

  /** Make the disk what the checkpoint shows, and remove the checkpoint with all that was written since. */
  async discard(checkpoint: Checkpoint): Promise<void> {
    const { overlay } = this.#unused(checkpoint);
    const { tree } = this.#host;
    const shown = shownBy(overlay);
    if (!tree.active.chain.includes(overlay)) {
      throw new FsError(
        'EBUSY',
        `the disk has left the branch of checkpoint '${checkpoint.name}', and nothing of it was written since; roll back to it first, or delete it without discarding`,
      );
    }
    const doomed = this.#subtree(overlay);
    for (const layer of doomed) this.#refuseSnapshots(layer, 'discarded');
    for (const point of this.#points) {
      if (point.pins > 0 && doomed.includes(point.overlay)) {
        throw new FsError('EBUSY', `a file of checkpoint '${point.checkpoint.name}' is open; close it first`);
      }
    }
    await this.refuseDependents([...doomed, shown]);
    if (overlay.mark?.merging === true) throw this.#merging(checkpoint);
    if (doomed.includes(tree.active)) await this.#branchFrom(shown);
    for (const layer of doomed.toReversed()) if (tree.layers.has(layer)) await this.#dropLeaf(layer);
    await this.#tidy({});
  }

  /**
   * Make the disk what the checkpoint shows. What it holds now stays, as a checkpoint of its own if anything was written
   * since the last one.
   */
  async rollback(checkpoint: Checkpoint): Promise<void> {
    const { overlay } = this.#point(checkpoint);
    if (overlay.mark?.merging === true) throw this.#merging(checkpoint);
    const { tree } = this.#host;
    const before = tree.active;
    const empty = before.mark !== undefined && isEmpty(before);
    let kept: Layer | undefined;
    if (!empty) kept = this.#keep(before);
    else if (this.#isNamed(before) && before.mark !== undefined) {
      before.mark = { ...before.mark, kept: true };
      writeMark(before.file, before.mark);
    }
    try {
      await this.#branchFrom(shownBy(overlay));
    } catch (error) {
      if (kept !== undefined) this.#drop(kept);
      throw error;
    }
    if (empty && !this.#isNamed(before) && tree.above(before).length === 0) await this.#dropLeaf(before);
  }

  /** @throws FsError EEXIST, EBUSY, ENOTSUP */
  async rename(checkpoint: Checkpoint, newName: string): Promise<Checkpoint> {
    const point = this.#point(checkpoint);
    if (newName === checkpoint.name && newName === checkpoint.realName) return checkpoint;
    this.checkName(newName, checkpoint);
    const { overlay } = point;
    if (overlay.mark?.merging === true) throw this.#merging(checkpoint);
    await this.refuseDependents([overlay]);
    this.#move(overlay, freeOverlayPath(dirname(overlay.path), this.#diskName, newName));
    this.relist();
    return point.checkpoint;
  }

  #create(path: string, below: Layer, flags: { readonly pending?: boolean; readonly kept?: boolean } = {}): Layer {
    const { tree } = this.#host;
    // One more could be made, but not opened again.
    if (below.chain.length > MAX_DEPTH) {
      throw new FsError(
        'ENOSPC',
        `${below.path} stands on ${MAX_DEPTH} files already, the most there can be; delete an overlay first, which merges two of them`,
      );
    }
    return createOverlay(path, below, {
      size: below.virtualSize,
      cacheBytes: tree.options.cacheBytes,
      mark: {
        pending: false,
        kept: false,
        ...flags,
        sequence: tree.nextSequence,
        merging: false,
        becomesBottom: false,
        bottom: false,
        createdMs: Date.now(),
        details: { consistency: 'crash' },
        takesName: '',
      },
    });
  }

  /** A checkpoint of what the disk is about to leave; the end of a branch. */
  #keep(layer: Layer): Layer {
    const { tree } = this.#host;
    const taken = new Set(this.checkpoints.map(({ name }) => name));
    let name = BEFORE_ROLLBACK;
    for (let number = 2; taken.has(name); number++) name = `${BEFORE_ROLLBACK}-${number}`;
    const kept = this.#create(freeOverlayPath(tree.overlayFolder, this.#diskName, name), layer, { kept: true });
    closeImage(kept.image);
    lockImage(kept.file.fd, kept.path, 'read', 'write');
    tree.add(kept);
    return kept;
  }

  /** Go on over a layer that was left before: in a fresh overlay that is no checkpoint. */
  async #branchFrom(shown: Layer): Promise<void> {
    const { tree } = this.#host;
    const next = this.#create(freeUnnamedPath(tree.overlayFolder, this.#diskName), shown);
    try {
      await this.#goOnIn(next, () => {});
    } catch (error) {
      this.#drop(next);
      throw error;
    }
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
    if (!this.#host.tree.layers.has(overlay)) return;
    await mergeLayers(this.#host, overlay, {});
    this.relist();
  }

  /** Let the disk go on in `next`; see `switchLayer`. */
  async #goOnIn(next: Layer, commit: () => void): Promise<void> {
    const { tree } = this.#host;
    const activate = (): void => {
      tree.add(next);
      tree.activate(next);
    };
    await switchLayer(tree.active, next, commit, activate, () => this.#host.relinked());
  }

  async #remove(overlay: Layer, options: StepOptions): Promise<void> {
    const { tree } = this.#host;
    const shown = shownBy(overlay);
    this.#refuseSnapshots(overlay, 'merged');
    await this.refuseDependents([overlay]);
    if (tree.above(overlay).length === 0 && tree.active !== overlay) return this.#dropLeaf(overlay);
    if (tree.above(shown).length > 1) {
      // Others stand on what it shows: nothing can move there, but the name can go.
      if (this.#isNamed(overlay)) this.#move(overlay, freeUnnamedPath(dirname(overlay.path), this.#diskName), true);
      this.relist();
      return;
    }
    await this.refuseDependents([shown]);
    try {
      await mergeLayers(this.#host, overlay, options);
    } finally {
      this.relist();
    }
  }

  /** Layers that no checkpoint needs any more become one with the layer below, as soon as nothing else stands on that. */
  async #tidy(options: StepOptions): Promise<void> {
    const { tree } = this.#host;
    for (;;) {
      const idle = tree.overlays.find(
        (overlay) => !this.#isNamed(overlay) && tree.above(shownBy(overlay)).length === 1 && !this.#stuck.has(overlay),
      );
      if (idle === undefined) return;
      try {
        await this.#remove(idle, options);
      } catch (error) {
        if (!(error instanceof FsError)) throw error;
        // The checkpoint is deleted; this layer waits for the next time.
        if (error.errno === 'EINTR') return;
        this.#stuck.add(idle);
      }
    }
  }

  /** Remove the end of a branch that the disk has left, and with it what only it showed. */
  async #dropLeaf(overlay: Layer): Promise<void> {
    const { tree } = this.#host;
    const below = shownBy(overlay);
    forgetElsewhere(below, overlay.path);
    removeOverlayFiles(overlay.path);
    tree.forget(overlay);
    await this.#host.relinked();
    overlay[Symbol.dispose]();
    this.relist();
    const last = below.mark !== undefined && below !== tree.active && tree.above(below).length === 0;
    if (last && !this.#isNamed(below) && below.qcow2?.snapshots.entries.length === 0) await this.#dropLeaf(below);
  }

  /** An overlay that was just made, and in which nobody goes on. */
  #drop(overlay: Layer): void {
    const { tree } = this.#host;
    if (tree.layers.has(overlay)) tree.forget(overlay);
    overlay[Symbol.dispose]();
    forgetElsewhere(shownBy(overlay), overlay.path);
    removeOverlayFiles(overlay.path);
  }

  /** Another file name, with the links of those above: at every instant each name leads to a correct chain. */
  #move(overlay: Layer, path: string, withoutStates = false): void {
    const { tree } = this.#host;
    const { mark, path: oldPath } = overlay;
    if (mark === undefined) throw new Error(`${oldPath} lost its mark`);
    overlay.mark = { ...mark, takesName: basename(path) };
    writeMark(overlay.file, overlay.mark);
    rememberElsewhere(shownBy(overlay), path);
    addName(oldPath, path);
    overlay.moveTo(path);
    for (const above of tree.above(overlay)) standOn(above, overlay);
    if (!withoutStates) renameStateFiles(oldPath, path);
    forgetElsewhere(shownBy(overlay), oldPath);
    removeOverlayFiles(oldPath);
    overlay.mark = { ...mark, takesName: '' };
    writeMark(overlay.file, overlay.mark);
  }

  #isNamed(overlay: Layer): boolean {
    return overlay.mark?.pending !== true && pointNameOf(this.#diskName, overlay.name) !== undefined;
  }

  /** An overlay and all that stand on it, each behind the one below. */
  #subtree(overlay: Layer): Layer[] {
    return [overlay, ...this.#host.tree.above(overlay).flatMap((above) => this.#subtree(above))];
  }

  #refuseSnapshots(layer: Layer, what: string): void {
    const names = layer.qcow2?.snapshots.entries.map(({ name }) => `'${name}'`) ?? [];
    if (names.length === 0) return;
    throw new FsError(
      'EBUSY',
      `${layer.name} holds the internal checkpoint${names.length === 1 ? '' : 's'} ${names.join(', ')}, which would be lost if it were ${what}; delete ${names.length === 1 ? 'it' : 'them'} first`,
    );
  }

  /** @throws FsError EBUSY, naming the images of others that are built on one of these layers */
  async refuseDependents(layers: readonly Layer[]): Promise<void> {
    const dependents = await this.#host.tree.dependents(layers);
    if (dependents.length === 0) return;
    const paths = dependents.map(({ path }) => path).join(', ');
    throw new FsError(
      'EBUSY',
      `${paths} ${dependents.length === 1 ? 'has' : 'have'} ${dependents[0]?.backing} as backing file and would break; rebase or remove ${dependents.length === 1 ? 'it' : 'them'} first`,
    );
  }

  #unused(checkpoint: Checkpoint): Point {
    const point = this.#point(checkpoint);
    if (point.pins === 0) return point;
    throw new FsError(
      'EBUSY',
      `a file of checkpoint '${checkpoint.name}' is open; close it, then delete the checkpoint`,
    );
  }

  #merging({ name }: Checkpoint): FsError {
    return new FsError('EBUSY', `checkpoint '${name}' is being merged away: delete it once more to finish that`);
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
