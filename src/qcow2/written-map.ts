/**
 * Which parts of the disk were written since a moment: one bit for each, in memory that all threads share. A move of data
 * out of an image that is being written goes in rounds by it. Off, it costs a write one atomic load.
 */
import type { Image } from './image.ts';
import { WRITTEN_BITS, word } from './image.ts';

const WORD_BITS = 32;

/** Note every change from now on, with an empty map. */
export function trackWrites(image: Image): void {
  const { clusterBits } = image.geometry;
  let shift = clusterBits;
  while (image.virtualSize() / 2 ** shift > WRITTEN_BITS) shift++;
  image.lock();
  try {
    Atomics.store(image.words, word.WRITTEN_SHIFT, 0);
    image.writtenMap.fill(0);
    Atomics.store(image.words, word.WRITTEN_SHIFT, shift);
  } finally {
    image.unlock();
  }
}

export function stopTracking(image: Image): void {
  Atomics.store(image.words, word.WRITTEN_SHIFT, 0);
}

/**
 * A change of the guest bytes [guest, end) has ended, well or not. Called by the data path behind the bytes: whoever takes
 * the bit before it reads them sees either the new bytes, or the bit again.
 */
export function noteWritten(image: Image, guest: number, end: number): void {
  const shift = Atomics.load(image.words, word.WRITTEN_SHIFT);
  if (shift === 0 || guest >= end) return;
  const unit = 2 ** shift;
  // The last bit stands for all that is behind it.
  const last = Math.min(Math.floor((end - 1) / unit), WRITTEN_BITS - 1);
  let bit = Math.min(Math.floor(guest / unit), WRITTEN_BITS - 1);
  while (bit <= last) {
    const first = bit % WORD_BITS;
    const count = Math.min(WORD_BITS - first, last - bit + 1);
    Atomics.or(image.writtenMap, Math.floor(bit / WORD_BITS), maskOf(first, count));
    bit += count;
  }
}

/**
 * Guest ranges [from, to) that were written since `trackWrites`, or since they were taken last; each is forgotten as it
 * is told. The ends are multiples of the cluster size, or the disk's.
 */
export function* takeWritten(image: Image): Generator<{ readonly from: number; readonly to: number }, void> {
  const shift = Atomics.load(image.words, word.WRITTEN_SHIFT);
  if (shift === 0) return;
  const unit = 2 ** shift;
  const size = image.virtualSize();
  const words = Math.min(image.writtenMap.length, Math.ceil(size / unit / WORD_BITS));
  for (let index = 0; index < words; index++) {
    for (let bit = 0; bit < WORD_BITS; ) {
      const bits = Atomics.load(image.writtenMap, index) >>> bit;
      if (bits === 0) break;
      const first = bit + (31 - Math.clz32(bits & -bits));
      let end = first + 1;
      while (end < WORD_BITS && (bits & (1 << (end - bit))) !== 0) end++;
      Atomics.and(image.writtenMap, index, ~maskOf(first, end - first));
      const last = index * WORD_BITS + end === WRITTEN_BITS;
      yield {
        from: (index * WORD_BITS + first) * unit,
        to: last ? size : Math.min(size, (index * WORD_BITS + end) * unit),
      };
      bit = end;
    }
  }
}

/** `count` bits from `first` on. */
const maskOf = (first: number, count: number): number => (count === WORD_BITS ? -1 : ((1 << count) - 1) << first);

/** Bytes that `takeWritten` would tell of now, at most. */
export function writtenBytes(image: Image): number {
  const shift = Atomics.load(image.words, word.WRITTEN_SHIFT);
  if (shift === 0) return 0;
  let bits = 0;
  const words = Math.ceil(image.virtualSize() / 2 ** shift / WORD_BITS);
  for (let index = 0; index < Math.min(words, image.writtenMap.length); index++) {
    for (let left = Atomics.load(image.writtenMap, index); left !== 0; left &= left - 1) bits++;
  }
  return bits * 2 ** shift;
}
