/** A seeded source of numbers: the same seed gives the same bytes and the same script on every machine. */
export class Random {
  #state: number;

  constructor(seed: number) {
    // The generator never leaves the state zero, so zero must not be one.
    this.#state = seed >>> 0 || 0x6b43a9b5;
    for (let warm = 0; warm < 8; warm++) this.#word();
  }

  /** xorshift32 with the shifts 13, 17, 5 (G. Marsaglia, "Xorshift RNGs", 2003). */
  #word(): number {
    let x = this.#state;
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    this.#state = x >>> 0;
    return this.#state;
  }

  /** 0 ≤ result < limit; limit up to 2^53. */
  below(limit: number): number {
    const high = this.#word() >>> 11;
    return Math.floor(((high * 2 ** 32 + this.#word()) / 2 ** 53) * limit);
  }

  pick<T>(list: readonly T[]): T {
    if (list.length === 0) throw new Error('nothing to pick from');
    return list[this.below(list.length)] as T;
  }

  bytes(length: number): Buffer {
    const words = new Uint32Array(Math.ceil(length / 4));
    for (let index = 0; index < words.length; index++) words[index] = this.#word();
    return Buffer.from(words.buffer, 0, length);
  }
}
