/** The shared table of open disk files: what the data threads must know of an fh, in one SharedArrayBuffer. */
import { DATA_HANDLES } from '../fuse/data-plane.ts';

const SLOT_BYTES = 32;
const SLOT_WORDS = SLOT_BYTES / 4;
const SLOT_DOUBLES = SLOT_BYTES / 8;

/** Flags of a slot; 0 means free. `GROWS`: guest state on its way in, a file that grows by what is written to it. */
export const flag = { IN_USE: 1, WRITABLE: 2, GROWS: 4 } as const;

/** `contentsId` of an open file whose contents do not exist yet: the main thread serves it. */
export const NO_CONTENTS = 0;

/** What a slot says of one open file. */
export interface OpenRange {
  /** `SharedContents.id`, or NO_CONTENTS. */
  readonly contentsId: number;
  /** Where the file starts in the contents, in bytes. */
  readonly base: number;
  /** Bytes; Infinity for a file as long as the disk, also after it has grown. */
  readonly length: number;
  readonly writable: boolean;
  readonly grows?: boolean;
}

/**
 * The first 32 bytes hold the generation word; slot n follows at (n + 1) × 32: flags and contents id (int32), then base
 * and length (doubles, exact to 2^53) at bytes 16 and 24.
 *
 * Only the main thread writes. A slot is complete, flags last, before the OPEN that hands it out is answered, and freed
 * after the kernel's RELEASE, which follows the answers to all requests on it: no thread ever reads one half-written.
 * Only the contents id may change in between, by `show`.
 */
export class SlotTable {
  readonly shared: SharedArrayBuffer;
  readonly #words: Int32Array;
  readonly #doubles: Float64Array;
  /** Main thread only: freed slots, and the first slot never used. */
  readonly #freed: number[] = [];
  #fresh = 0;

  constructor(shared = new SharedArrayBuffer((DATA_HANDLES + 1) * SLOT_BYTES)) {
    this.shared = shared;
    this.#words = new Int32Array(shared);
    this.#doubles = new Float64Array(shared);
  }

  /** Changes after every message to the threads; a thread that sees it changed drains its port. */
  generation(): number {
    return Atomics.load(this.#words, 0);
  }

  advanceGeneration(): void {
    Atomics.add(this.#words, 0, 1);
  }

  /** Returns the slot, or undefined when all are taken: the main thread then serves that file alone. */
  take(range: OpenRange): number | undefined {
    const slot = this.#freed.pop() ?? (this.#fresh < DATA_HANDLES ? this.#fresh++ : undefined);
    if (slot === undefined) return undefined;
    const word = (slot + 1) * SLOT_WORDS;
    const double = (slot + 1) * SLOT_DOUBLES;
    this.#words[word + 1] = range.contentsId;
    this.#doubles[double + 2] = range.base;
    this.#doubles[double + 3] = range.length;
    const flags = flag.IN_USE | (range.writable ? flag.WRITABLE : 0) | (range.grows === true ? flag.GROWS : 0);
    Atomics.store(this.#words, word, flags);
    return slot;
  }

  /** Let an open file show other contents. The threads were told of them before. */
  show(slot: number, contentsId: number): void {
    Atomics.store(this.#words, (slot + 1) * SLOT_WORDS + 1, contentsId);
  }

  free(slot: number): void {
    Atomics.store(this.#words, (slot + 1) * SLOT_WORDS, 0);
    this.#freed.push(slot);
  }

  flags(slot: number): number {
    return Atomics.load(this.#words, (slot + 1) * SLOT_WORDS);
  }

  contentsId(slot: number): number {
    return Atomics.load(this.#words, (slot + 1) * SLOT_WORDS + 1);
  }

  base(slot: number): number {
    return this.#doubles[(slot + 1) * SLOT_DOUBLES + 2] as number;
  }

  length(slot: number): number {
    return this.#doubles[(slot + 1) * SLOT_DOUBLES + 3] as number;
  }
}
