/** What the format asks of a writer before it changes anything (qcow2 specification, feature bits). */
import { attemptIfRoom, barrier, switchHeader } from './barrier.ts';
import { autoclear, headerAt, readHeader } from './header.ts';
import type { Image } from './image.ts';
import { word } from './image.ts';
import { mark, unmark } from './session-mark.ts';
import { dropBitmaps } from './stale-bitmaps.ts';

/** Before the first write of any kind: autoclear bits of features that this writer does not keep up are cleared. */
export function beforeData(image: Image): void {
  if (Atomics.load(image.words, word.WRITTEN) === 1) return;
  image.lock();
  try {
    if (image.words[word.WRITTEN] === 1) return;
    if (image.geometry.version >= 3) clearAutoclear(image);
    Atomics.store(image.words, word.WRITTEN, 1);
  } finally {
    image.unlock();
  }
}

/**
 * Before clusters are moved, with the mutex held: guest data stays as it is, and so do bitmaps, which are left in their
 * place. What else an autoclear bit may stand for is not known here.
 */
export function beforeMoving(image: Image): void {
  beforeMetadata(image);
  if (image.geometry.version < 3 || Atomics.load(image.words, word.WRITTEN) === 1) return;
  const header = readHeader(image.file);
  const kept = header.autoclear & (autoclear.DATA_FILE_RAW | autoclear.BITMAPS);
  if (kept !== header.autoclear) writeAutoclear(image, kept);
}

function clearAutoclear(image: Image): void {
  const header = readHeader(image.file);
  const kept = header.autoclear & autoclear.DATA_FILE_RAW;
  if (kept === header.autoclear) return;
  if (header.bitmaps !== undefined) {
    beforeMetadata(image);
    dropBitmaps(image, readHeader(image.file), kept);
    return;
  }
  writeAutoclear(image, kept);
}

function writeAutoclear(image: Image, kept: bigint): void {
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setBigUint64(0, kept);
  switchHeader(image, () => image.file.write(bytes, 0, 8, headerAt.autoclear));
}

/**
 * Before the first change of metadata, with the mutex held: the session is marked, durably, so that an opener after a
 * crash counts the refcounts anew.
 * @throws FsError ENOSPC on a host that has no room even for that; nothing is changed then
 */
export function beforeMetadata(image: Image): void {
  if (image.words[word.DIRTY] === 1) return;
  attemptIfRoom(image, () => mark(image.file));
  barrier(image);
  image.words[word.DIRTY] = 1;
}

/** Everything is in the file and durable: the refcounts can be trusted again. */
export function markClean(image: Image): void {
  if (image.words[word.DIRTY] === 0) return;
  unmark(image.file);
  image.words[word.DIRTY] = 0;
}
