/** The moments of a disk, as the tables of its images tell of them: to compare them, and to see what each takes. */
import type { Moment, MomentLayer } from '../qcow2/difference.ts';
import { imageLayer, type OwnLayer, rawLayer } from '../qcow2/own-extents.ts';
import type { SnapshotEntry } from '../qcow2/snapshot-table.ts';
import { readSnapshotL1 } from '../qcow2/snapshots.ts';
import type { Layer } from './layer.ts';

/**
 * What a layer with all below it shows.
 * @param snapshot one of the layer's own: what it showed then
 * @throws FsError EIO for a snapshot that cannot be used
 */
export function momentOf(top: Layer, snapshot?: SnapshotEntry): Moment {
  const layers = top.chain.map((layer): MomentLayer => ({ layer: ownLayer(layer), file: layer }));
  if (snapshot === undefined) return layers;
  const table = readSnapshotL1(top.image, snapshot);
  return [{ layer: imageLayer(top.image, table, snapshot.virtualSize), file: top }, ...layers.slice(1)];
}

/** A layer by itself. */
export const ownLayer = (layer: Layer): OwnLayer =>
  layer.qcow2 === undefined ? rawLayer(layer.file) : imageLayer(layer.qcow2.image);
