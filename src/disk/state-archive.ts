/**
 * The guest's state in the VM-state area of a snapshot, as one tar archive, so that any program that can read the area
 * can unpack it:
 *
 *     checkpoint.json        what the checkpoint remembers; blanks fill it up, so that
 *     state                  the memory begins at a cluster, where it was written to when nothing else was known
 *     state.kern, state.meta what came beside it
 */
import { TAR_BLOCK_BYTES, TAR_END_BYTES, tarDataBytes, tarHeader } from './tar.ts';

/** The names that state files can have, in the order of the archive. */
export const stateFileNames: readonly string[] = ['state', 'state.kern', 'state.meta'];
/** The one that is written in its place. */
export const MEMORY_FILE = 'state';

const DETAILS_FILE = 'checkpoint.json';
/** checkpoint.json and both headers have this much room at least. */
const FRONT_BYTES = 64 * 1024;

/** A member of the archive. Offsets and sizes in bytes. */
export interface ArchivedFile {
  readonly name: string;
  readonly offset: number;
  readonly bytes: number;
  /** Without holes, about. */
  readonly allocatedBytes: number;
}

/** Where the memory begins in the archive; a multiple of the cluster size. */
export const memoryOffset = (clusterBytes: number): number => Math.ceil(FRONT_BYTES / clusterBytes) * clusterBytes;

/** Most bytes that checkpoint.json has room for. */
export const detailsCapacity = (clusterBytes: number): number => memoryOffset(clusterBytes) - 2 * TAR_BLOCK_BYTES;

/** Where each file lies in the archive, and what goes around their data. */
export interface ArchiveLayout {
  readonly files: readonly ArchivedFile[];
  /** Headers and the end, to be written at `offset`. */
  readonly pieces: readonly { readonly offset: number; readonly bytes: Uint8Array }[];
  /** Of the whole archive. */
  readonly bytes: number;
}

/**
 * @param files in the order of `stateFileNames`; the memory file may be missing, and is empty then
 * @param details text of checkpoint.json, at most `detailsCapacity` bytes
 */
export function layOutArchive(
  files: readonly Omit<ArchivedFile, 'offset'>[],
  details: string,
  modifiedMs: number,
  clusterBytes: number,
): ArchiveLayout {
  const memory = files.find(({ name }) => name === MEMORY_FILE);
  const start = memoryOffset(clusterBytes);
  const capacity = detailsCapacity(clusterBytes);
  const front = Buffer.alloc(start, ' ');
  front.set(tarHeader(DETAILS_FILE, capacity, modifiedMs));
  if (front.write(details, TAR_BLOCK_BYTES) > capacity)
    throw new RangeError('the details of a checkpoint are too long');
  front.write('\n', start - TAR_BLOCK_BYTES - 1);
  front.set(tarHeader(MEMORY_FILE, memory?.bytes ?? 0, modifiedMs), start - TAR_BLOCK_BYTES);

  const pieces = [{ offset: 0, bytes: front as Uint8Array }];
  const placed: ArchivedFile[] = [];
  let end = start;
  for (const { name, bytes, allocatedBytes } of files) {
    if (name !== MEMORY_FILE) {
      pieces.push({ offset: end, bytes: tarHeader(name, bytes, modifiedMs) });
      end += TAR_BLOCK_BYTES;
    }
    placed.push({ name, offset: end, bytes, allocatedBytes });
    end += tarDataBytes(bytes);
  }
  // The end is blank by itself: what was never written reads as zeros.
  return { files: placed, pieces, bytes: end + TAR_END_BYTES };
}

/** The text of checkpoint.json, from the first `memoryOffset` bytes of an archive; undefined if that is none of ours. */
export function detailsText(front: Uint8Array): string | undefined {
  const name = Buffer.from(front.subarray(0, DETAILS_FILE.length)).toString('latin1');
  if (name !== DETAILS_FILE) return undefined;
  return Buffer.from(front.subarray(TAR_BLOCK_BYTES, front.length - TAR_BLOCK_BYTES)).toString('utf8');
}
