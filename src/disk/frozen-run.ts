/** Adjacent layers of a chain that do not change, read through one mapping (merged-mapping.ts). */
import { FrozenImage, type FrozenLayer } from '../qcow2/frozen-layer.ts';
import { type Backing, frozenTables } from '../qcow2/image.ts';
import { createMapping, MergedLayers, type SharedMapping } from '../qcow2/merged-mapping.ts';
import { HostFile } from '../storage/host-file.ts';
import type { SharedLayer } from './chain.ts';

/** Plain data, at the first layer of the run. */
export interface SharedRun {
  /** Unique in this process: another one when a layer of the run is another, or what is below it. */
  readonly id: number;
  /** Layers, the first one among them. */
  readonly count: number;
  readonly mapping: SharedMapping;
}

let lastId = 0;

/**
 * Memory for a mapping of these layers, top first; they must stay as they are for as long as it is used.
 * @param cacheBytes for the mapping at most
 */
export function shareRun(layers: readonly SharedLayer[], cacheBytes: number): SharedRun {
  const geometries = layers.flatMap((layer) => (layer.format === 'raw' ? [] : [layer.image.geometry]));
  const size = attachFrozen(layers[0] as SharedLayer).size;
  return { id: ++lastId, count: layers.length, mapping: createMapping(geometries, size, cacheBytes) };
}

/** This thread's object over a run. @param below what is below its last layer */
export function attachRun(run: SharedRun, layers: readonly SharedLayer[], below: Backing | undefined): Backing {
  return new MergedLayers(run.mapping, layers.map(attachFrozen), below);
}

function attachFrozen(layer: SharedLayer): FrozenLayer {
  const file = HostFile.adopt(layer.file);
  if (layer.format === 'raw') return { size: file.size(), image: undefined, data: file };
  const data = layer.data === undefined ? file : HostFile.adopt(layer.data);
  return new FrozenImage(frozenTables(layer.image), file, data);
}
