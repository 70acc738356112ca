/** What an external checkpoint takes, from the tables alone. */
import { differences, type Moment } from '../qcow2/difference.ts';
import { type OwnLayer, ownExtents } from '../qcow2/own-extents.ts';
import type { Steps } from '../qcow2/steps.ts';
import type { Space } from './disk.ts';

/** Runs that one step looks at, at most. */
const STEP_RUNS = 256;

export interface OverlaySpace extends Space {
  /** Data in the overlay itself. */
  readonly overlayData: number;
}

/**
 * Guest bytes, which are host bytes but for tables and compressed clusters. Its own is what the overlay hides of the layer
 * below: a merge overwrites that.
 * @param shown what the checkpoint shows, the layer below the overlay first
 * @param alone nothing else stands on that layer
 */
export function* overlaySpace(overlay: OwnLayer, shown: Moment, alone: boolean): Steps<OverlaySpace> {
  const below = shown[0]?.layer;
  const own = below === undefined || !alone ? 0 : yield* hiddenBytes(overlay, below);
  const all = yield* differences([], shown);
  const data = all.reduce((sum, { length, kind }) => sum + (kind === 'data' ? length : 0), 0);
  return { own, shared: Math.max(0, data - own), overlayData: yield* dataBytes(overlay) };
}

function* dataBytes(overlay: OwnLayer): Steps<number> {
  let data = 0;
  let looked = 0;
  for (const { offset, length, kind } of ownExtents(overlay, 0, overlay.size())) {
    if (kind === 'data' || kind === 'compressed') data += length;
    if (++looked % STEP_RUNS === 0) yield offset / overlay.size();
  }
  return data;
}

function* hiddenBytes(overlay: OwnLayer, below: OwnLayer): Steps<number> {
  const size = Math.min(overlay.size(), below.size());
  let hidden = 0;
  let looked = 0;
  for (const { offset, length, kind } of ownExtents(overlay, 0, size)) {
    if (kind !== 'unallocated') {
      for (const under of ownExtents(below, offset, length)) {
        if (under.kind === 'data' || under.kind === 'compressed') hidden += under.length;
      }
    }
    if (++looked % STEP_RUNS === 0) yield offset / size;
  }
  return hidden;
}
