/**
 * Compressed data of the tail moves to holes. It begins anywhere in a cluster, may end in the next one, and shares both
 * with other data: pieces are moved, not clusters. What was adjacent stays as close as it was, to the byte.
 *
 * Nothing ever overwrites compressed data in place, so that writers go on. Write order as in move-data.ts.
 */
import { setImmediate as giveWay } from 'node:timers/promises';
import { barrier } from '../barrier.ts';
import { relieve } from '../flush.ts';
import type { Image } from '../image.ts';
import { word } from '../image.ts';
import { compressedBytes, compressedOffset, isCompressed, movedCompressed } from '../l2-entry.ts';
import { maxRefcount } from '../refcount-entry.ts';
import { changeRefcount, refcountOf } from '../refcounts.ts';
import { type Holes, locked } from './host-space.ts';
import { allKnown, checkCounted, type Pass } from './pass.ts';
import { Releases } from './releases.ts';
import { type EntryChange, switchEntry } from './switch-entries.ts';
import { type Blob, role } from './tail-references.ts';

/** Moved between two barriers. */
const BATCH_BYTES = 16 * 2 ** 20;
const SECTOR_BYTES = 512;

interface BlobMove {
  readonly blob: Blob;
  /** Host offset of the new place. */
  readonly to: number;
  /** Counts that its new clusters got for it. */
  readonly references: number;
}

export async function moveCompressed(pass: Pass): Promise<void> {
  const { references } = pass;
  const blobs = [...references.blobs()];
  let batch: Blob[] = [];
  let bytes = 0;
  // From the end of the file downwards, each batch in the order of the file.
  for (const [index, blob] of blobs.toReversed().entries()) {
    batch.push(blob);
    bytes += blob.bytes;
    if (bytes < BATCH_BYTES && index < blobs.length - 1) continue;
    if (pass.stop()) return;
    const room = await moveBatch(pass, batch.toReversed());
    await giveWay();
    if (!room) return;
    batch = [];
    bytes = 0;
  }
}

/** @returns false when there is no room left */
async function moveBatch(pass: Pass, blobs: readonly Blob[]): Promise<boolean> {
  const { image } = pass;
  const releases = new Releases();
  const packing = new Packing(image, pass.holes);
  const moves: BlobMove[] = [];
  const placed = locked(image, () => {
    for (const blob of blobs) {
      if (!mayMove(pass, blob)) continue;
      const to = packing.place(blob);
      if (to < 0) return false;
      const references = blob.entries.reduce((sum, { table }) => sum + pass.references.timesOf(table), 0);
      if (!canCount(image, to, blob.bytes, references)) continue;
      eachCluster(image, to, blob.bytes, (cluster) => changeRefcount(image, cluster, references));
      moves.push({ blob, to, references });
    }
    return true;
  });
  // Pieces that are scattered over single clusters may need more of them than they leave.
  const worth = packing.clusters <= emptied(pass, moves);
  let done = 0;
  try {
    if (!worth) return false;
    for (const { blob, to } of moves) copy(image, blob, to);
    locked(image, () => image.refcounts.writeDirty());
    barrier(image);
    // Whoever has kept what lay in the new places has to forget it.
    Atomics.add(image.words, word.COMPRESSED_CHANGES, 1);
    for (const move of moves) {
      locked(image, () => switchBlob(pass, move, releases));
      done++;
      relieve(image);
    }
  } finally {
    locked(image, () => {
      for (const { blob, to, references } of moves.slice(done)) {
        eachCluster(image, to, blob.bytes, (cluster) => changeRefcount(image, cluster, -references));
      }
      packing.finish();
    });
    await releases.commit(image);
  }
  return placed;
}

/** Clusters of the tail that nothing is left in when these have moved. */
function emptied({ image, references }: Pass, moves: readonly BlobMove[]): number {
  const leaving = new Map<number, number>();
  for (const { blob, references: count } of moves) {
    eachCluster(image, blob.offset, blob.bytes, (cluster) => leaving.set(cluster, (leaving.get(cluster) ?? 0) + count));
  }
  let clusters = 0;
  for (const [cluster, count] of leaving) {
    if (cluster >= references.first && references.expected(cluster) <= count) clusters++;
  }
  return clusters;
}

/** All of its clusters in the tail hold compressed data only, and are counted as they should be. */
function mayMove(pass: Pass, { offset, bytes }: Blob): boolean {
  const { image, references } = pass;
  let may = true;
  eachCluster(image, offset, bytes, (cluster) => {
    if (cluster < references.first) return;
    if (cluster >= references.end || references.roleOf(cluster) !== role.COMPRESSED || !allKnown(pass, cluster)) {
      may = false;
    }
  });
  return may;
}

/** Denser packed than before, a cluster may come to have more references than its count holds. */
function canCount(image: Image, to: number, bytes: number, references: number): boolean {
  let can = true;
  eachCluster(image, to, bytes, (cluster) => {
    if (refcountOf(image, cluster) + references > maxRefcount(image.geometry.refcountOrder)) can = false;
  });
  return can;
}

function eachCluster({ geometry }: Image, offset: number, bytes: number, visit: (cluster: number) => void): void {
  const last = Math.floor((offset + bytes - 1) / geometry.clusterBytes);
  for (let cluster = Math.floor(offset / geometry.clusterBytes); cluster <= last; cluster++) visit(cluster);
}

/** Where the pieces go. Clusters that are being filled have a refcount of one more until `finish`. */
class Packing {
  readonly #image: Image;
  readonly #holes: Holes;
  readonly #clusters: number[] = [];
  /** Free bytes of the clusters that are being filled. */
  #from = 0;
  #to = 0;
  /** The last piece: behind it in the file, and how far it was moved. */
  #behind = 0;
  #distance = 0;

  constructor(image: Image, holes: Holes) {
    this.#image = image;
    this.#holes = holes;
  }

  get clusters(): number {
    return this.#clusters.length;
  }

  /** @returns the new host offset, in the same place within a sector as the old one; -1 if there is no room */
  place({ offset, bytes }: Blob): number {
    const gap = offset - this.#behind;
    // It begins in the sector in which the last one ends, or right behind it.
    if (this.#to > 0 && gap > -SECTOR_BYTES && gap <= 0 && this.#reach(offset - this.#distance + bytes)) {
      return this.#put(offset - this.#distance, offset, bytes);
    }
    const within = offset % SECTOR_BYTES;
    const next = Math.ceil(this.#from / SECTOR_BYTES) * SECTOR_BYTES + within;
    if (this.#to > 0 && this.#reach(next + bytes)) return this.#put(next, offset, bytes);
    return this.#begin(within, offset, bytes);
  }

  /** In clusters that nothing was put into yet. */
  #begin(within: number, offset: number, bytes: number): number {
    const { clusterBytes } = this.#image.geometry;
    const count = Math.ceil((within + bytes) / clusterBytes);
    const hole = count === 1 ? this.#holes.take(1) : this.#holes.takeAdjacent(count);
    if (hole === undefined) return -1;
    for (let index = 0; index < count; index++) this.#clusters.push(hole.first + index);
    this.#to = (hole.first + count) * clusterBytes;
    return this.#put(hole.first * clusterBytes + within, offset, bytes);
  }

  #put(to: number, offset: number, bytes: number): number {
    this.#from = to + bytes;
    this.#behind = offset + bytes;
    this.#distance = offset - to;
    return to;
  }

  /** Whether the clusters that are being filled reach, or can be made to reach, up to `end`. */
  #reach(end: number): boolean {
    const { clusterBytes } = this.#image.geometry;
    while (end > this.#to) {
      if (!this.#holes.takeThis(this.#to / clusterBytes)) return false;
      this.#clusters.push(this.#to / clusterBytes);
      this.#to += clusterBytes;
    }
    return true;
  }

  finish(): void {
    for (const cluster of this.#clusters) changeRefcount(this.#image, cluster, -1);
  }
}

function copy(image: Image, { offset, bytes }: Blob, to: number): void {
  const buffer = new Uint8Array(bytes);
  // The last sector of the file may be there in part only; a fresh buffer is zeros.
  image.file.read(buffer, 0, bytes, offset);
  image.file.write(buffer, 0, bytes, to);
}

function switchBlob(pass: Pass, { blob, to, references: counted }: BlobMove, releases: Releases): void {
  const { image, references } = pass;
  const { clusterBits } = image.geometry;
  const change: EntryChange = {
    own: false,
    isOld: ({ high, low }) =>
      isCompressed(high) &&
      compressedOffset(high, low, clusterBits) === blob.offset &&
      compressedBytes(high, low, clusterBits) === blob.bytes,
    renew: (entry) => movedCompressed(entry, clusterBits, to),
  };
  let found = 0;
  for (const { table, entry } of blob.entries) {
    const here = switchEntry(image, references, table, entry, change, false);
    if (here < 0) found = Number.NEGATIVE_INFINITY;
    found += here;
  }
  found = Math.max(0, found);
  if (found > 0) {
    eachCluster(image, blob.offset, blob.bytes, (cluster) => checkCounted(pass, cluster, found));
    for (const { table, entry } of blob.entries) switchEntry(image, references, table, entry, change, true);
    eachCluster(image, blob.offset, blob.bytes, (cluster) => releases.add(cluster, found));
    pass.moved(blob.bytes / image.geometry.clusterBytes);
  }
  eachCluster(image, to, blob.bytes, (cluster) => changeRefcount(image, cluster, found - counted));
}
