/** Pointing L2 entries to another place. With the mutex held, one cluster's entries at a time. */
import { attempt } from '../barrier.ts';
import type { Image } from '../image.ts';
import { COPIED, isCopied } from '../l2-entry.ts';
import { l2TableAt } from '../lookup.ts';
import type { TailReferences } from './tail-references.ts';

/** An entry's two halves. */
export interface Halves {
  high: number;
  low: number;
}

/** Which entries, and what becomes of them. */
export interface EntryChange {
  /** The entry still refers to the old place. */
  readonly isOld: (entry: Halves) => boolean;
  /** Make it refer to the new one; its flags stay. */
  readonly renew: (entry: Halves) => void;
  /** Entries of the image's own clusters may be changed: the gate is closed, so that nobody writes to these in place. */
  readonly own: boolean;
}

const halves: Halves = { high: 0, low: 0 };
const bytes = new Uint8Array(8);
const view = new DataView(bytes.buffer);

/**
 * References that entry `entry` of a table has to the old place: of the snapshots that share the table, and of the live
 * mapping, in this table or in the copy that a writer has made of it since.
 * @param apply change them; false: only count
 * @returns references; -1 if the entry must stay as it is: a writer may be writing to the old place now
 */
export function switchEntry(
  image: Image,
  references: TailReferences,
  table: number,
  entry: number,
  change: EntryChange,
  apply: boolean,
): number {
  const { clusterBytes, l2EntryBytes } = image.geometry;
  const host = (references.l2Cluster[table] as number) * clusterBytes;
  const snapshots = references.snapshotReferences[table] as number;
  const l1Index = references.l1Index[table] as number;
  const active = l1Index < 0 ? 0 : l2TableAt(image, undefined, l1Index);
  const copied = active !== 0 && isCopied(image.l1.getUint32(l1Index * 8));
  // A table that the live disk calls its own, and snapshots share: whatever is true, it is not touched.
  if (copied && active === host && snapshots > 0) return -1;
  const at = entry * l2EntryBytes;
  let found = 0;
  if (active === host ? !copied : snapshots > 0) {
    if (switchInFile(image, host, at, change, apply)) found += snapshots + (active === host ? 1 : 0);
  }
  if (copied) {
    const own = switchInCache(image, active + at, change, apply);
    if (own < 0) return -1;
    found += own;
  }
  return found;
}

/** A table that is shared, or not known to be the image's own: never changed in the cache. */
function switchInFile(image: Image, host: number, at: number, change: EntryChange, apply: boolean): boolean {
  const { sliceBytes } = image.geometry;
  if (image.file.read(bytes, 0, 8, host + at) < 8) return false;
  halves.high = view.getUint32(0);
  halves.low = view.getUint32(4);
  if (!change.isOld(halves)) return false;
  if (!apply) return true;
  change.renew(halves);
  view.setUint32(0, halves.high);
  view.setUint32(4, halves.low);
  attempt(image, () => image.file.write(bytes, 0, 8, host + at));
  const slice = host + at - (at % sliceBytes);
  image.l2.drop(slice, slice + sliceBytes);
  return true;
}

function switchInCache(image: Image, position: number, change: EntryChange, apply: boolean): number {
  const { sliceBytes } = image.geometry;
  const { l2 } = image;
  const slice = l2.load(position - (position % sliceBytes));
  const at = slice + (position % sliceBytes);
  halves.high = l2.view.getUint32(at);
  halves.low = l2.view.getUint32(at + 4);
  if (!change.isOld(halves)) return 0;
  if ((halves.high & COPIED) !== 0 && !change.own) return -1;
  if (!apply) return 1;
  change.renew(halves);
  l2.view.setUint32(at, halves.high);
  l2.view.setUint32(at + 4, halves.low);
  l2.markDirty(slice);
  return 1;
}
