/** What each checkpoint of a disk takes: internal ones in the image that they are in, external ones in the chain. */
import { flush } from '../qcow2/flush.ts';
import { readHeader } from '../qcow2/header.ts';
import type { SnapshotEntry } from '../qcow2/snapshot-table.ts';
import { imageSpace, type MappingSpace } from '../qcow2/space.ts';
import type { Steps } from '../qcow2/steps.ts';
import type { Checkpoint, CheckpointSpace, DiskSpace, Space } from './disk.ts';
import type { Layer } from './layer.ts';
import { momentOf, ownLayer } from './moments.ts';
import { overlaySpace } from './overlay-space.ts';

export interface MeasuredDisk {
  readonly active: Layer;
  readonly layers: Iterable<Layer>;
  readonly checkpoints: readonly Checkpoint[];
  /** Where an internal checkpoint is, or which layer an external one made. */
  find(checkpoint: Checkpoint): { readonly entry: SnapshotEntry; readonly layer: Layer } | { readonly overlay: Layer };
}

/** @throws CorruptImage, FsError EIO */
export function* diskSpace({ active, layers, checkpoints, find }: MeasuredDisk): Steps<DiskSpace> {
  const inImages = new Map<SnapshotEntry, MappingSpace>();
  let live: Space = { own: 0, shared: 0 };
  for (const layer of layers) {
    if (layer.qcow2 === undefined) continue;
    const { image, snapshots } = layer.qcow2;
    const { entries } = snapshots;
    if (image.geometry.writable) flush(image);
    const space = yield* imageSpace(layer.file, readHeader(layer.file), entries);
    for (const [index, entry] of entries.entries()) inImages.set(entry, space.snapshots[index] as MappingSpace);
    if (layer === active) live = { own: space.live.own, shared: space.live.shared };
  }
  const measured: CheckpointSpace[] = [];
  for (const checkpoint of checkpoints) {
    const found = find(checkpoint);
    if ('entry' in found) {
      measured.push({ checkpoint, ...(inImages.get(found.entry) ?? { own: 0, shared: 0, freed: 0 }) });
      continue;
    }
    const { overlay } = found;
    const below = overlay.below as Layer;
    const alone = [...layers].every((other) => other === overlay || other.below !== below);
    const { own, shared, overlayData } = yield* overlaySpace(ownLayer(overlay), momentOf(below), alone);
    // One file less: its tables go with what is overwritten. Where others stand on what is below, only the name goes.
    const tables = alone ? Math.max(0, overlay.file.allocatedBytes() - overlayData) : 0;
    measured.push({ checkpoint, own, shared, freed: own + tables });
  }
  return { checkpoints: measured, live };
}
