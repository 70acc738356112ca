/**
 * Crash tests: record what is done to a file, then look at every file that a crash could have left behind.
 *
 * Two kinds of crash. When only the process dies, all that it wrote is there: the file after some prefix of the
 * operations. When the power fails, what a flush had not made durable is there or not, each operation for itself, and
 * a write may be torn between two sectors.
 */
import { type Errno, FsError } from '../../src/errors.ts';
import type { Storage } from '../../src/storage/storage.ts';
import type { MemoryStorage } from './memory-storage.ts';

export type Operation =
  | { readonly kind: 'write'; readonly position: number; readonly bytes: Uint8Array }
  | { readonly kind: 'truncate'; readonly size: number }
  | { readonly kind: 'punch'; readonly position: number; readonly length: number }
  | { readonly kind: 'flush' }
  /** Said by the test, for instance that a checkpoint's call has returned. Changes nothing. */
  | { readonly kind: 'mark'; readonly label: string };

/** The process has died in the middle: no FsError, so that nobody takes it for a failure to be dealt with. */
export class Died extends Error {
  override readonly name = 'Died';
}

/** What goes wrong, and when. */
export interface Failure {
  /** Which of the operations that it concerns, from 0, counted from now. */
  readonly at: number;
  /** `death`: this operation and all that follow throw `Died`. */
  readonly how: Errno | 'death';
  /** Concerned are the changes (write, truncate, punch, flush), the default, or the reads. */
  readonly of?: 'changes' | 'reads';
  /** How many in a row fail; Infinity for a disk that stays full. 1 if left out. */
  readonly times?: number;
  /** A failing write still puts that many of its bytes into the file. */
  readonly partialBytes?: number;
}

/** A storage that remembers each change, and fails when told to. */
export class Recorder implements Storage {
  readonly path: string;
  readonly readOnly: boolean;
  readonly #inner: Storage;
  readonly #operations: Operation[] = [];
  #failure: Failure | undefined;
  #concerned = 0;
  #dead = false;

  constructor(inner: Storage) {
    this.#inner = inner;
    this.path = inner.path;
    this.readOnly = inner.readOnly;
  }

  /** What has succeeded so far, in order. */
  get operations(): readonly Operation[] {
    return this.#operations;
  }

  /** Changes so far, failed ones left out: the bound of a loop over `Failure.at`. */
  get changes(): number {
    return this.#operations.filter(({ kind }) => kind !== 'mark').length;
  }

  mark(label: string): void {
    this.#operations.push({ kind: 'mark', label });
  }

  /** From now on; undefined: nothing fails any more. */
  fail(failure: Failure | undefined): void {
    this.#failure = failure;
    this.#concerned = 0;
  }

  size(): number {
    this.#mustLive();
    return this.#inner.size();
  }

  read(target: Uint8Array, at: number, length: number, position: number): number {
    this.#step('reads');
    return this.#inner.read(target, at, length, position);
  }

  write(source: Uint8Array, at: number, length: number, position: number): void {
    const bytes = source.slice(at, at + length);
    this.#step('changes', (partialBytes) => this.#put(bytes.subarray(0, partialBytes), position));
    this.#put(bytes, position);
  }

  flush(): void {
    this.#step('changes');
    this.#inner.flush();
    this.#operations.push({ kind: 'flush' });
  }

  truncate(size: number): void {
    this.#step('changes');
    this.#inner.truncate(size);
    this.#operations.push({ kind: 'truncate', size });
  }

  punch(position: number, length: number): boolean {
    this.#step('changes');
    if (!this.#inner.punch(position, length)) return false;
    this.#operations.push({ kind: 'punch', position, length });
    return true;
  }

  nextData(position: number): number {
    this.#mustLive();
    return this.#inner.nextData(position);
  }

  nextHole(position: number): number {
    this.#mustLive();
    return this.#inner.nextHole(position);
  }

  allocatedBytes(): number {
    this.#mustLive();
    return this.#inner.allocatedBytes();
  }

  #put(bytes: Uint8Array, position: number): void {
    this.#inner.write(bytes, 0, bytes.length, position);
    this.#operations.push({ kind: 'write', position, bytes });
  }

  #mustLive(): void {
    if (this.#dead) throw new Died('the process has died');
  }

  #step(kind: 'changes' | 'reads', writePart?: (bytes: number) => void): void {
    this.#mustLive();
    const failure = this.#failure;
    if (failure === undefined || (failure.of ?? 'changes') !== kind) return;
    const index = this.#concerned++;
    if (index < failure.at || index >= failure.at + (failure.times ?? 1)) return;
    if (failure.partialBytes !== undefined) writePart?.(failure.partialBytes);
    if (failure.how === 'death') {
      this.#dead = true;
      throw new Died(`the process died at change ${index}`);
    }
    throw new FsError(failure.how, `'${this.path}': made to fail with ${failure.how}`);
  }
}

/** The file as a crash could have left it. */
export interface CrashImage {
  /** Says which crash: for the message of a failed expectation. */
  readonly label: string;
  /** This image's own: may be repaired, written, saved. */
  readonly file: MemoryStorage;
  /** Marks that were passed before the crash, in order. */
  readonly marks: readonly string[];
}

export interface CrashOptions {
  /** `process`: prefixes only. `power`: prefixes, and what could be lost of each. `power` if left out. */
  readonly kind?: 'process' | 'power';
  /** Up to this many operations without a flush between, all subsets are tried; 4 if left out. */
  readonly exhaustive?: number;
  /** Above that: each lost alone, each kept alone, and this many random subsets; 4 if left out. */
  readonly samples?: number;
  /** Of the random subsets. 1 if left out. */
  readonly seed?: number;
}

/** A write below this size is never torn. */
const SECTOR_BYTES = 512;

/**
 * Every file that a crash during `operations` could have left of `before`: after each prefix, and for a power failure
 * with subsets of the operations since the last flush lost, or the last write torn.
 */
export function* crashImages(
  before: MemoryStorage,
  operations: readonly Operation[],
  options: CrashOptions = {},
): Generator<CrashImage> {
  const { kind = 'power', exhaustive = 4, samples = 4, seed = 1 } = options;
  const random = randomNumbers(seed);
  /** What is durable for sure. */
  let durable = before.copy();
  /** Operations since the last flush, with their places in `operations`. */
  let pending: { operation: Operation; index: number }[] = [];
  const marks: string[] = [];

  yield { label: 'before the first operation', file: durable.copy(), marks: [] };
  for (const [index, operation] of operations.entries()) {
    const when = `after operation ${index} of ${operations.length} (${describe(operation)})`;
    if (operation.kind === 'mark') {
      marks.push(operation.label);
      // What the mark promises must hold in every file that could be left from here on, with nothing else done.
      pending.push({ operation, index });
    } else if (operation.kind === 'flush') {
      durable = afterAll(durable, pending);
      pending = [];
      yield { label: when, file: durable.copy(), marks: [...marks] };
      continue;
    } else {
      pending.push({ operation, index });
    }

    yield { label: when, file: afterAll(durable, pending), marks: [...marks] };
    if (kind === 'process') continue;

    for (const torn of tearings(operation)) {
      const earlier = pending.slice(0, -1);
      const file = afterAll(durable, [...earlier, { operation: torn, index }]);
      yield { label: `${when}, torn to ${describe(torn)}`, file, marks: [...marks] };
    }
    const changes = pending.filter(({ operation }) => operation.kind !== 'mark');
    // Without a mark the last operation is always kept: the files where it is lost are those after its predecessor.
    const losable = operation.kind === 'mark' ? changes : changes.slice(0, -1);
    for (const lost of lossesOf(losable.length, exhaustive, samples, random)) {
      const gone = new Set(losable.filter((_, place) => lost[place]).map((one) => one.index));
      const left = changes.filter((one) => !gone.has(one.index));
      const label = `${when}, lost: ${[...gone].join(', ')}`;
      yield { label, file: afterAll(durable, left), marks: [...marks] };
    }
  }
}

function afterAll(start: MemoryStorage, steps: readonly { readonly operation: Operation }[]): MemoryStorage {
  const file = start.copy();
  for (const { operation } of steps) apply(file, operation);
  return file;
}

function apply(file: MemoryStorage, operation: Operation): void {
  switch (operation.kind) {
    case 'write':
      file.write(operation.bytes, 0, operation.bytes.length, operation.position);
      return;
    case 'truncate':
      file.truncate(operation.size);
      return;
    case 'punch':
      file.punch(operation.position, operation.length);
      return;
    case 'flush':
    case 'mark':
      return;
  }
}

/** A write of several sectors of which only the first, or all but the last, or only the last reached the disk. */
function tearings(operation: Operation): Operation[] {
  if (operation.kind !== 'write') return [];
  const { position, bytes } = operation;
  const firstCut = SECTOR_BYTES - (position % SECTOR_BYTES);
  if (firstCut >= bytes.length) return [];
  const rest = (bytes.length - firstCut) % SECTOR_BYTES;
  const lastCut = bytes.length - (rest === 0 ? SECTOR_BYTES : rest);
  const head = (end: number): Operation => ({ kind: 'write', position, bytes: bytes.subarray(0, end) });
  const tail: Operation = { kind: 'write', position: position + lastCut, bytes: bytes.subarray(lastCut) };
  return firstCut === lastCut ? [head(firstCut), tail] : [head(firstCut), head(lastCut), tail];
}

/** Which of `count` operations are lost, one array for each case; never none. */
function* lossesOf(count: number, exhaustive: number, samples: number, random: () => number): Generator<boolean[]> {
  const places = Array.from({ length: count }, (_, place) => place);
  if (count <= exhaustive) {
    for (let mask = 1; mask < 2 ** count; mask++) yield places.map((place) => (mask >> place) % 2 === 1);
    return;
  }
  yield places.map(() => true);
  for (const one of places) {
    yield places.map((place) => place === one);
    yield places.map((place) => place !== one);
  }
  for (let sample = 0; sample < samples; sample++) yield places.map(() => random() < 0.5);
}

function describe(operation: Operation): string {
  switch (operation.kind) {
    case 'write':
      return `write of ${operation.bytes.length} bytes at 0x${operation.position.toString(16)}`;
    case 'truncate':
      return `truncate to ${operation.size}`;
    case 'punch':
      return `punch of ${operation.length} bytes at 0x${operation.position.toString(16)}`;
    case 'flush':
      return 'flush';
    case 'mark':
      return operation.label;
  }
}

/** Numbers from 0 to 1, the same ones for the same seed (a linear congruential generator modulo 2^32). */
function randomNumbers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return state / 2 ** 32;
  };
}
