/** What the movers of one pass over the tail share. */
import { CorruptImage } from '../../errors.ts';
import type { Image } from '../image.ts';
import { maxRefcount } from '../refcount-entry.ts';
import { changeRefcount, refcountOf } from '../refcounts.ts';
import type { SnapshotList } from '../snapshots.ts';
import type { Holes } from './host-space.ts';
import type { TailReferences } from './tail-references.ts';

export interface Pass {
  readonly image: Image;
  readonly list: SnapshotList;
  readonly references: TailReferences;
  readonly holes: Holes;
  /** Clusters that left the tail. */
  readonly moved: (clusters: number) => void;
  /** True: stop where the image is whole, which is between any two batches. */
  readonly stop: () => boolean;
}

/** A cluster of the tail on its way to a hole, with all its references. */
export interface Move {
  readonly from: number;
  readonly to: number;
  /** Refcount that the new place has got. */
  readonly references: number;
}

/**
 * Whether what the tables have to a cluster is all that its refcount counts. If it counts more, something refers to it
 * that was not found (a leak), or a writer has let go of it and the count has not fallen yet. With the mutex held.
 */
export function allKnown({ image, references }: Pass, cluster: number): boolean {
  const expected = references.expected(cluster);
  return refcountOf(image, cluster) <= expected && expected <= maxRefcount(image.geometry.refcountOrder);
}

/** @throws CorruptImage if there are more references than counts: nothing of the cluster was changed yet */
export function checkCounted({ image }: Pass, cluster: number, found: number): void {
  const counted = refcountOf(image, cluster);
  if (found > counted) {
    throw new CorruptImage(
      `${image.file.path}: host cluster ${cluster} has ${found} references but a refcount of ${counted}; run vdskfs check --repair all on it`,
    );
  }
}

/** The new places are free again, as if they had never been taken. With the mutex held. */
export function giveBackMoves(image: Image, moves: readonly Move[]): void {
  for (const { to, references } of moves) changeRefcount(image, to, -references);
}
