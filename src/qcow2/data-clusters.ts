import type { Image } from './image.ts';
import { number } from './image.ts';
import { emptyEntry } from './l2-update.ts';
import { l2Tables } from './references.ts';
import { holdsData } from './write.ts';

/** L2 tables read for the count at most: opening an image must stay quick whatever its size. */
const COUNT_BYTES = 8 * 2 ** 20;

/**
 * Clusters of the live disk that hold data in the image itself, -1 if there are too many tables to count them now. Reads
 * the file: changes must have been flushed, and no write may be running.
 */
export function dataClusters(image: Image): number {
  const { clusterBytes, l2EntryBytes, unitsPerCluster } = image.geometry;
  const tables = l2Tables(image.l1, image.numbers[number.L1_ENTRIES] as number).filter((table) => table !== 0);
  if (tables.length * clusterBytes > COUNT_BYTES) return -1;
  const bytes = new Uint8Array(clusterBytes);
  const view = new DataView(bytes.buffer);
  const entry = emptyEntry();
  let count = 0;
  for (const table of tables) {
    const got = image.file.read(bytes, 0, clusterBytes, table);
    for (let at = 0; at + l2EntryBytes <= got; at += l2EntryBytes) {
      entry.high = view.getUint32(at);
      entry.low = view.getUint32(at + 4);
      entry.zero = unitsPerCluster === 1 ? 0 : view.getUint32(at + 8);
      entry.allocated = unitsPerCluster === 1 ? 0 : view.getUint32(at + 12);
      // Nonsense in a table is reported to whoever reads it; here it is no data.
      if ((entry.high | entry.low) !== 0 && isData(image, entry)) count++;
    }
  }
  return count;
}

function isData(image: Image, entry: ReturnType<typeof emptyEntry>): boolean {
  try {
    return holdsData(image, entry);
  } catch {
    return false;
  }
}
