/**
 * A mutex in one word of shared memory: 0 free, 1 held, 2 held and waited for. Uncontended, taking and releasing it
 * costs two atomic operations and no system call.
 */

/** Tries before sleeping: the holder usually needs less time than a futex call. */
const SPINS = 100;

export function lock(words: Int32Array, index: number): void {
  for (let spin = 0; spin < SPINS; spin++) {
    if (Atomics.compareExchange(words, index, 0, 1) === 0) return;
  }
  while (Atomics.exchange(words, index, 2) !== 0) Atomics.wait(words, index, 2);
}

export function unlock(words: Int32Array, index: number): void {
  if (Atomics.exchange(words, index, 0) === 2) Atomics.notify(words, index, 1);
}
