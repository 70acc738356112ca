/**
 * Persistent bitmaps when the disk is written by a program that does not keep them up: the format has their autoclear bit
 * cleared, after which nobody may use them. Left in the file they would be clusters that no one refers to, so they go.
 */
import { switchHeader } from './barrier.ts';
import { bitmapClusterOf, decodeBitmapDirectory } from './bitmap-directory.ts';
import { encodeHeaderCluster, type Header } from './header.ts';
import { extensionType } from './header-extensions.ts';
import type { Image } from './image.ts';
import { unlink } from './unlinked.ts';

/** Bitmaps with more pieces than this keep their clusters, as leaks that `check --repair leaks` finds. */
const MAX_RANGES = 4096;

interface ClusterRange {
  readonly first: number;
  count: number;
}

/**
 * Write the header without the bitmaps extension and with `autoclearBits`, durably, then let go of the bitmaps' clusters.
 * With the mutex held.
 */
export function dropBitmaps(image: Image, header: Header, autoclearBits: bigint): void {
  const ranges = bitmapClusters(image, header);
  const extensions = header.extensions.filter(({ type }) => type !== extensionType.BITMAPS);
  const cluster = encodeHeaderCluster(header, { extensions, autoclear: autoclearBits });
  switchHeader(image, () => image.file.write(cluster, 0, cluster.length, 0));
  for (const { first, count } of ranges) unlink(image, first, count);
}

/** Clusters of directory, tables and data; none if anything in them is wrong: then they are not touched. */
function bitmapClusters(image: Image, header: Header): ClusterRange[] {
  const { bitmaps } = header;
  if (bitmaps === undefined) return [];
  const { clusterBytes } = image.geometry;
  const ranges: ClusterRange[] = [];
  const add = (offset: number, bytes: number): void => {
    const first = offset / clusterBytes;
    const count = Math.ceil(bytes / clusterBytes);
    const last = ranges.at(-1);
    if (last !== undefined && last.first + last.count === first) last.count += count;
    else if (ranges.length < MAX_RANGES) ranges.push({ first, count });
  };
  try {
    const directory = read(image, bitmaps.directoryOffset, bitmaps.directoryBytes);
    add(bitmaps.directoryOffset, bitmaps.directoryBytes);
    for (const { offset, entries } of decodeBitmapDirectory(directory, bitmaps.count, header)) {
      const table = read(image, offset, entries * 8);
      const view = new DataView(table.buffer);
      add(offset, entries * 8);
      for (let at = 0; at < table.length; at += 8) {
        const data = bitmapClusterOf(view.getUint32(at), view.getUint32(at + 4), clusterBytes);
        if (data !== 0) add(data, clusterBytes);
      }
    }
  } catch {
    // Nonsense in the bitmaps: what they occupy cannot be told apart from what others do.
    return [];
  }
  return ranges;
}

function read(image: Image, offset: number, bytes: number): Uint8Array {
  const target = new Uint8Array(Math.min(bytes, Math.max(0, image.file.size() - offset)));
  image.file.read(target, 0, target.length, offset);
  return target;
}
