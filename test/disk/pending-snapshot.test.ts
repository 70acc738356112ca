/**
 * Between the instant of a checkpoint and its being seen the guest writes its state and then its disk: whatever happens
 * meanwhile, a crash and a failing host included, the checkpoint is there as a whole or not at all.
 */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { decodeRecord } from '../../src/disk/checkpoint-record.ts';
import type { StateContents } from '../../src/disk/disk.ts';
import { PendingSnapshot } from '../../src/disk/pending-snapshot.ts';
import { type Errno, FsError } from '../../src/errors.ts';
import { checkImage } from '../../src/qcow2/check.ts';
import type { FormatOptions } from '../../src/qcow2/create.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import { readRange } from '../../src/qcow2/read.ts';
import { isMarked } from '../../src/qcow2/session-mark.ts';
import { applicationData } from '../../src/qcow2/snapshot-table.ts';
import { readSnapshotL1, vmStateOffset } from '../../src/qcow2/snapshots.ts';
import { freezeSnapshot } from '../../src/qcow2/take-snapshot.ts';
import { propertyRuns, soakFactor } from '../property-runs.ts';
import {
  closeSession,
  formatted,
  openSession,
  type Pattern,
  patternBacking,
  qemuCheck,
  recover,
  type Session,
} from '../qcow2/model.ts';
import { type Action, after, contentsOf, difference, during, perform, type State } from '../qcow2/script.ts';
import type { MemoryStorage } from '../storage/memory-storage.ts';
import { type CrashImage, crashImages, Recorder } from '../storage/recorder.ts';

interface Variant {
  readonly options: FormatOptions;
  readonly backingBytes?: number;
}

const variants: Readonly<Record<string, Variant>> = {
  '512-byte clusters': { options: { size: 60_416, clusterBytes: 512 } },
  '512-byte clusters, version 2': { options: { size: 60_416, clusterBytes: 512, version: 2 } },
  'enough tables to be shared later': { options: { size: 18 * 32_768, clusterBytes: 512 } },
  'a longer backing file': {
    options: { size: 60_416, clusterBytes: 1024, backing: { file: 'b', format: 'raw' } },
    backingBytes: 500_000,
  },
  'a longer backing file, version 2': {
    options: { size: 60_416, clusterBytes: 1024, version: 2, backing: { file: 'b', format: 'raw' } },
    backingBytes: 500_000,
  },
  'subclusters over a longer backing file': {
    options: { size: 200_192, clusterBytes: 16384, extendedL2: true, backing: { file: 'b', format: 'raw' } },
    backingBytes: 1_000_000,
  },
  '64-bit refcounts': { options: { size: 50_176, clusterBytes: 512, refcountBits: 64 } },
};

/** What happens while the checkpoint is pending; places are fractions of the disk, or of the state that there may be. */
interface Step {
  readonly do: 'write' | 'discard' | 'flush' | 'state' | 'state zero' | 'state hole' | 'state size' | 'kern';
  readonly at: number;
  readonly length: number;
  readonly seed: number;
}

const STATE_BYTES = 150_000;
const KERN_BYTES = 9_000;

const kinds: readonly Step['do'][] = [
  ...(['write', 'write', 'write', 'discard', 'flush'] as const),
  ...(['state', 'state', 'state', 'state', 'state zero', 'state hole', 'state size', 'kern'] as const),
];

const steps = (most: number) =>
  fc.array(
    fc.record({
      do: fc.constantFrom(...kinds),
      at: fc.double({ min: 0, max: 1, noNaN: true }),
      length: fc.double({ min: 0, max: 1, noNaN: true }),
      seed: fc.integer({ min: 1, max: 0x7fff_ffff }),
    }),
    { minLength: 2, maxLength: most },
  );

/** Bytes that are those of no other seed, never 0. */
function pattern(length: number, seed: number): Uint8Array {
  let state = seed;
  return new Uint8Array(length).map(() => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return 1 + ((state >>> 16) % 255);
  });
}

/** A file of state as a plain array. */
class Model {
  bytes = new Uint8Array();

  resize(size: number): void {
    const next = new Uint8Array(size);
    next.set(this.bytes.subarray(0, size));
    this.bytes = next;
  }

  write(source: Uint8Array, at: number): void {
    if (at + source.length > this.bytes.length) this.resize(at + source.length);
    this.bytes.set(source, at);
  }
}

type Files = ReadonlyMap<string, Uint8Array>;

/** The state files of each snapshot that has any. */
function statesOf({ image, list }: Session): Map<string, Files> {
  const states = new Map<string, Files>();
  for (const entry of list.entries) {
    const { files } = decodeRecord(applicationData(entry), entry.vmStateSize);
    if (files.length === 0) continue;
    const table = readSnapshotL1(image, entry);
    const contents = files.map(({ name, offset, bytes }): [string, Uint8Array] => {
      const target = new Uint8Array(bytes);
      readRange(image, table, target, 0, bytes, vmStateOffset(image, entry) + offset);
      return [name, target];
    });
    states.set(entry.name, new Map(contents));
  }
  return states;
}

function expectSame(found: Files | undefined, expected: Files | undefined): void {
  expect([...(found?.keys() ?? [])]).toEqual([...(expected?.keys() ?? [])]);
  for (const [name, bytes] of found ?? []) {
    expect(Buffer.compare(bytes, expected?.get(name) as Uint8Array), `file ${name}`).toBe(0);
  }
}

async function freeze({ image, list }: Session): Promise<PendingSnapshot> {
  const frozen = await freezeSnapshot(image, list, 0, () => {});
  return new PendingSnapshot(frozen, {
    image,
    list,
    name: 'running',
    progress: () => {},
    share: (area) => ({ id: 0, kind: 'vm-state', chain: [], area }),
    published: () => undefined as never,
  });
}

/** Runs a script; `mark` is told what may be there from that moment on. */
class Run {
  readonly #session: Session;
  readonly #mark: (states: readonly State[]) => void;
  readonly #memory = new Model();
  readonly #kern = new Model();
  state: State;

  constructor(session: Session, state: State, mark: (states: readonly State[]) => void = () => {}) {
    this.#session = session;
    this.state = state;
    this.#mark = mark;
  }

  /** @param ending `publish` is told to fail by nobody: what it throws is thrown on */
  async run(script: readonly Step[], ending: 'publish' | 'abandon'): Promise<Files> {
    this.#mark([this.state, after(this.state, { do: 'flush' })]);
    const pending = await freeze(this.#session);
    this.state = after(this.state, { do: 'flush' });
    const frozen = this.state.versions[0] as Uint8Array;
    this.#mark([this.state]);
    const files = { state: pending.createState('state').contents, kern: pending.createState('state.kern').contents };
    try {
      for (const step of script) await this.#step(step, files);
    } catch (error) {
      await pending.abandon();
      throw error;
    }
    for (const [model, file] of [
      [this.#memory, files.state],
      [this.#kern, files.kern],
    ] as const) {
      const found = new Uint8Array(file.size());
      file.read(found, 0, found.length, 0);
      expect(Buffer.compare(found, model.bytes)).toBe(0);
    }
    const published: State = { ...this.state, snapshots: new Map(this.state.snapshots).set('running', frozen) };
    if (ending === 'abandon') {
      await pending.abandon();
      this.state = after(this.state, { do: 'flush' });
    } else {
      this.#mark([this.state, published]);
      await pending.publish({ consistency: 'memory' });
      this.state = after(published, { do: 'flush' });
    }
    this.#mark([this.state]);
    return this.files();
  }

  files(): Files {
    return new Map([
      ['state', this.#memory.bytes],
      ['state.kern', this.#kern.bytes],
    ]);
  }

  async #step(step: Step, files: { readonly state: StateContents; readonly kern: StateContents }): Promise<void> {
    const model = step.do === 'kern' ? this.#kern : this.#memory;
    const file = step.do === 'kern' ? files.kern : files.state;
    const most = step.do === 'kern' ? KERN_BYTES : STATE_BYTES;
    const size = this.state.versions[0]?.length as number;
    switch (step.do) {
      case 'write':
      case 'discard':
      case 'flush': {
        const at = Math.floor(step.at * (size - 1));
        const length = Math.max(1, Math.floor(step.length ** 3 * (size - at)));
        const action: Action =
          step.do === 'write'
            ? { do: 'write', at, bytes: pattern(length, step.seed) }
            : step.do === 'discard'
              ? { do: 'discard', at, length }
              : { do: 'flush' };
        this.#mark(during(this.state, action));
        await perform(this.#session, action);
        this.state = after(this.state, action);
        this.#mark([this.state]);
        return;
      }
      case 'state':
      case 'state zero':
      case 'kern': {
        const at = Math.floor(step.at * (most - 1));
        const length = Math.max(1, Math.floor(step.length ** 2 * (most - at)));
        const bytes = step.do === 'state zero' ? new Uint8Array(length) : pattern(length, step.seed);
        expect(file.write(bytes, 0, length, at)).toBe(true);
        model.write(bytes, at);
        return;
      }
      case 'state hole': {
        const at = Math.floor(step.at * model.bytes.length);
        const length = Math.floor(step.length * (model.bytes.length - at));
        file.discard(at, length);
        model.bytes.fill(0, at, at + length);
        return;
      }
      case 'state size': {
        const bytes = Math.floor(step.at * most);
        file.setSize(bytes);
        model.resize(bytes);
        return;
      }
    }
  }
}

interface Prepared {
  readonly storage: MemoryStorage;
  readonly state: State;
  readonly backing: Pattern;
}

/** A disk with data all over, and an earlier snapshot. */
async function prepare({ options, backingBytes = 0 }: Variant): Promise<Prepared> {
  const backing: Pattern = backingBytes > 0 ? patternBacking(backingBytes) : undefined;
  const storage = formatted(options);
  const live = new Uint8Array(options.size);
  if (backing !== undefined) live.set(backing.content.subarray(0, options.size));
  let state: State = { versions: [live], snapshots: new Map() };
  const session = openSession(storage, storage, backing);
  const some: readonly Action[] = [
    { do: 'write', at: 1000, bytes: pattern(Math.floor(options.size * 0.9) - 1000, 1) },
    { do: 'take', name: 'earlier' },
    { do: 'write', at: 5000, bytes: pattern(20_000, 2) },
  ];
  for (const action of some) {
    await perform(session, action);
    state = after(state, action);
  }
  closeSession(session);
  return { storage, state: { ...state, versions: state.versions.slice(-1) }, backing };
}

describe.each(Object.entries(variants))('on a disk with %s', (_name, variant) => {
  it('is as it was at that instant, with all that was written to its state', async () => {
    const prepared = await prepare(variant);
    await fc.assert(
      fc.asyncProperty(steps(25), fc.constantFrom('publish', 'abandon'), async (script, ending) => {
        const { backing } = prepared;
        const file = prepared.storage.copy();
        const session = openSession(file, file, backing);
        const run = new Run(session, prepared.state);
        const files = await run.run(script, ending);
        expect(difference(contentsOf(session), run.state)).toBe(undefined);
        closeSession(session);
        expect(await checkImage(file.copy(), readHeader(file))).toMatchObject({ corruptions: 0, leaks: 0 });

        const again = openSession(file, file, backing);
        expect(difference(contentsOf(again), run.state)).toBe(undefined);
        expectSame(statesOf(again).get('running'), ending === 'publish' ? files : undefined);
        // What QEMU reads of a hole is the backing file's.
        const running = again.list.entries.find(({ name }) => name === 'running');
        if (running !== undefined && (backing?.size() ?? 0) > vmStateOffset(again.image, running)) {
          const { diskBytes: _, ...asQemu } = readSnapshotL1(again.image, running);
          const whole = new Uint8Array(running.vmStateSize);
          readRange(again.image, asQemu, whole, 0, whole.length, vmStateOffset(again.image, running));
          expect(Buffer.from(whole.subarray(0, 15)).toString()).toBe('checkpoint.json');
          const memory = files.get('state') as Uint8Array;
          const start = decodeRecord(applicationData(running), whole.length).files[0]?.offset as number;
          expect(Buffer.compare(whole.subarray(start, start + memory.length), memory)).toBe(0);
        }
        if (ending === 'publish') {
          for (const action of ['rollback', 'delete'] as const) {
            await perform(again, { do: action, name: 'running' });
            run.state = after(run.state, { do: action, name: 'running' });
          }
          expect(difference(contentsOf(again), run.state)).toBe(undefined);
        }
        closeSession(again);
        expect(await checkImage(file.copy(), readHeader(file))).toMatchObject({ corruptions: 0, leaks: 0 });
      }),
      { numRuns: propertyRuns(8), endOnFailure: true },
    );
  });

  it('is there as a whole or not at all after a crash', { timeout: 60_000 * soakFactor }, async () => {
    const prepared = await prepare(variant);
    await fc.assert(
      fc.asyncProperty(steps(10), fc.constantFrom('publish', 'publish', 'abandon'), async (script, ending) => {
        const { backing, storage } = prepared;
        const recorder = new Recorder(storage.copy());
        const session = openSession(recorder, recorder, backing);
        const allowed: (readonly State[])[] = [[prepared.state]];
        recorder.mark('0');
        const run = new Run(session, prepared.state, (states) => {
          recorder.mark(String(allowed.length));
          allowed.push(states);
        });
        const files = await run.run(script, ending);
        closeSession(session);
        for (const kind of ['process', 'power'] as const) {
          const images = [...crashImages(storage, recorder.operations, { kind, samples: 1 })];
          const every = Math.max(1, Math.floor(images.length / 25));
          for (let index = 0; index < images.length; index += every) {
            await expectWhole(images[index] as CrashImage, allowed, files, backing, index % 20 === 7);
          }
        }
      }),
      { numRuns: propertyRuns(1) },
    );
  });
});

const faultVariants = [
  '512-byte clusters',
  '512-byte clusters, version 2',
  'enough tables to be shared later',
] as const;

describe.each(faultVariants)('on a disk with %s', (name) => {
  it.each(['ENOSPC', 'EIO'] as const)('leaves nothing when the host answers %s', { timeout: 60_000 }, async (how) => {
    const prepared = await prepare(variants[name] as Variant);
    const step = { at: 0, length: 0, seed: 1 };
    const script: Step[] = [
      { ...step, do: 'state', at: 0, length: 0.4, seed: 3 },
      { ...step, do: 'write', at: 0.2, length: 0.5, seed: 4 },
      { ...step, do: 'kern', at: 0, length: 1, seed: 5 },
      { ...step, do: 'state', at: 0.2, length: 0.5, seed: 6 },
    ];
    const failures: string[] = [];
    for (const times of [1, Number.POSITIVE_INFINITY]) {
      for (let at = 0; ; at += times === 1 ? 2 : 5) {
        try {
          if (!(await failAt(prepared, script, { at, how, times }))) break;
        } catch (error) {
          failures.push(`change ${at}, ${times} times: ${(error as Error).stack}`);
          if (failures.length > 3) break;
        }
      }
    }
    expect(failures).toEqual([]);
  });
});

async function expectWhole(
  { file, label, marks }: CrashImage,
  allowed: readonly (readonly State[])[],
  files: Files,
  backing: Pattern,
  withQemu: boolean,
): Promise<void> {
  try {
    const header = readHeader(file);
    if (!isMarked(header)) {
      expect(await checkImage(file.copy(), header)).toMatchObject({ corruptions: 0, leaks: 0 });
    }
    recover(file);
    expect(await checkImage(file, readHeader(file))).toMatchObject({ corruptions: 0, leaks: 0 });
    const session = openSession(file, file, backing);
    const found = contentsOf(session);
    const states = allowed[Number(marks.at(-1) ?? 0)] as readonly State[];
    const differences = states.map((state) => difference(found, state));
    if (!differences.includes(undefined)) throw new Error(differences.join('; or '));
    expectSame(statesOf(session).get('running'), found.snapshots.has('running') ? files : undefined);
    closeSession(session);
    if (withQemu) qemuCheck(file);
  } catch (error) {
    throw new Error(`${label}, last mark: ${marks.at(-1)}: ${(error as Error).message}`, { cause: error });
  }
}

/** @returns false if there are fewer changes than `failure.at` */
async function failAt(
  { storage, state, backing }: Prepared,
  script: readonly Step[],
  failure: { readonly at: number; readonly how: Errno; readonly times: number },
): Promise<boolean> {
  const file = storage.copy();
  const recorder = new Recorder(file);
  const session = openSession(recorder, recorder, backing);
  const states: State[] = [state];
  const run = new Run(session, state, (allowed) => states.push(...allowed));
  const { changes } = recorder;
  recorder.fail(failure);
  let error: unknown;
  try {
    await run.run(script, 'publish');
  } catch (caught) {
    error = caught;
  }
  recorder.fail(undefined);
  if (error !== undefined && !(error instanceof FsError)) throw error;
  if (error !== undefined) {
    expect([failure.how, 'EIO']).toContain(error.errno);
    expect(error.message).toMatch(/^[^\n]{20,}$/);
  }
  const done = recorder.changes - changes <= failure.at && error === undefined;
  const published = error === undefined;
  expect(session.list.entries.some(({ name }) => name === 'running') || !published).toBe(true);
  closeSession(session);
  const header = readHeader(file);
  if (!isMarked(header)) {
    expect(await checkImage(file.copy(), header)).toMatchObject({ corruptions: 0, leaks: 0 });
  }
  recover(file);
  expect(await checkImage(file, readHeader(file))).toMatchObject({ corruptions: 0, leaks: 0 });
  const again = openSession(file, file, backing);
  const found = contentsOf(again);
  if (published) expect(difference(found, run.state)).toBe(undefined);
  // A write that failed may be there in part.
  const whole: State = { versions: states.flatMap(({ versions }) => versions), snapshots: found.snapshots };
  expect(difference(found, whole)).toBe(undefined);
  if (found.snapshots.has('running')) expectSame(statesOf(again).get('running'), run.files());
  return !done;
}
