/**
 * What the threads of the concurrency test write and look for: cells of 16 bytes that say who wrote them and where they
 * belong. Plain JavaScript, since a worker thread cannot load TypeScript.
 *
 * The lower part of the disk is private: pieces of PIECE_CELLS cells belong to the threads in turn, so that several write
 * in every cluster but none in another's bytes. The upper part is shared.
 */
export const CELL_BYTES = 16;
export const PIECE_CELLS = 96;
export const PRIVATE_CELLS = PIECE_CELLS * 2046;
export const SHARED_CELLS = 98_304;
export const CELLS = PRIVATE_CELLS + SHARED_CELLS;

export const kind = { WRITE: 0, DISCARD: 1 };

/** Words that all threads share. */
export const word = {
  PHASE: 0,
  /** Counts the roll backs. */
  GENERATION: 1,
  /** From here on, per thread: the phase it is in. */
  IN_PHASE: 8,
  /** Operations that have begun, and ended; numbers begin at 1. */
  BEGUN: 24,
  DONE: 40,
  COUNT: 56,
};

export const phase = { RUN: 0, READ_ONLY: 1, STOP: 2 };

/** Operations per thread that the log has room for; a thread that has done so many only reads. */
export const LOG_ENTRIES = 2 ** 18;

/** Memory for everything that is shared; `logs[thread]` has three words per operation: first cell, cells, kind. */
export function makeShared(threads) {
  return {
    words: new Int32Array(new SharedArrayBuffer(word.COUNT * 4)),
    base: new Int32Array(new SharedArrayBuffer(CELLS * 4)),
    logs: Array.from({ length: threads }, () => new Int32Array(new SharedArrayBuffer(LOG_ENTRIES * 3 * 4))),
  };
}

/** What a cell's first word says: who wrote it, and the number of the operation. Never 0, which is a cell of zeros. */
export const stamp = (thread, operation) => ((thread + 1) << 24) | operation;

const mix = (first, cell) => Math.imul(first ^ Math.imul(cell + 1, 0x9e37_79b1), 0x85eb_ca6b);

export function putCells(words, first, count, value) {
  for (let index = 0; index < count; index++) {
    const at = index * 4;
    words[at] = value;
    words[at + 1] = first + index;
    words[at + 2] = ~value;
    words[at + 3] = mix(value, first + index);
  }
}

/** The stamp of a cell, 0 for zeros, undefined if it is torn or does not belong here. */
export function stampOf(words, index, cell) {
  const at = index * 4;
  const value = words[at];
  if (value === 0) return (words[at + 1] | words[at + 2] | words[at + 3]) === 0 ? 0 : undefined;
  if (words[at + 1] !== cell || words[at + 2] !== ~value || words[at + 3] !== mix(value, cell)) return undefined;
  return value;
}

export function random(seed) {
  let state = seed | 1;
  return (below) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % below;
  };
}
