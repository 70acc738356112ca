/** The arrows of the write order (flush.ts), and what follows when one of them fails. */
import { FsError } from '../errors.ts';
import type { Image } from './image.ts';
import { failure, word } from './image.ts';

/**
 * Run what must not fail: when it does, nobody knows what the file holds, so that no write may follow.
 * @throws FsError EIO
 */
export function attempt<T>(image: Image, action: () => T): T {
  try {
    return action();
  } catch (error) {
    throw failed(image, error);
  }
}

/**
 * The same for writes after which nothing is lost where the host has no room for them: they can be done again.
 * @throws FsError ENOSPC, EIO
 */
export function attemptIfRoom<T>(image: Image, action: () => T): T {
  try {
    return action();
  } catch (error) {
    if (error instanceof FsError && error.errno === 'ENOSPC') throw error;
    throw failed(image, error);
  }
}

/** As `attempt`, for what takes pauses. */
export async function attemptLong(image: Image, action: () => Promise<void>): Promise<void> {
  try {
    await action();
  } catch (error) {
    throw failed(image, error);
  }
}

function failed(image: Image, cause: unknown): FsError {
  Atomics.compareExchange(image.words, word.FAILED, failure.NONE, failure.FLUSH);
  const sentence = `${image.file.path}: the changes could not be made durable; it is not written any more`;
  return new FsError('EIO', sentence, { cause });
}

/** Everything written to the image file before is durable when it returns. */
export function barrier(image: Image): void {
  attempt(image, () => image.file.flush());
}

/**
 * Change the header by one write, durably. Until it has happened the old structures count, from then on the new ones; if
 * it fails nobody knows which.
 */
export function switchHeader(image: Image, write: () => void): void {
  attempt(image, () => {
    write();
    image.file.flush();
  });
}

export const isFailed = (image: Image): boolean => Atomics.load(image.words, word.FAILED) !== failure.NONE;

/**
 * A change of refcounts was broken off and could not be taken back: clusters may be counted that nothing uses. The mark
 * of the session stays at its end, so that the next opener counts anew.
 */
export function countsTooHigh(image: Image): void {
  Atomics.store(image.words, word.COUNTS_TOO_HIGH, 1);
}
