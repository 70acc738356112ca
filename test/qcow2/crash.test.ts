/** Every file that a crash may leave opens again with what was promised (DESIGN.md section 4). */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { checkImage } from '../../src/qcow2/check.ts';
import type { FormatOptions } from '../../src/qcow2/create.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import type { Backing } from '../../src/qcow2/image.ts';
import { isMarked } from '../../src/qcow2/session-mark.ts';
import { propertyRuns, soakFactor } from '../property-runs.ts';
import type { MemoryStorage } from '../storage/memory-storage.ts';
import { type CrashImage, crashImages, Recorder } from '../storage/recorder.ts';
import { closeSession, formatted, openSession, type Pattern, patternBacking, qemuCheck, recover } from './model.ts';
import {
  type Action,
  after,
  allKinds,
  contentsOf,
  difference,
  during,
  perform,
  resolve,
  type State,
  type Step,
  steps,
} from './script.ts';

interface Recording {
  readonly before: MemoryStorage;
  readonly recorder: Recorder;
  /** What may be there after each mark, by its label. */
  readonly allowed: ReadonlyMap<string, readonly State[]>;
}

/**
 * Run the script, and note beside the changes of the file what may be read at each moment.
 * @param filled bytes of the disk that are written before
 */
async function record(
  options: FormatOptions,
  script: readonly Step[],
  backing: Pattern,
  filled = 0,
): Promise<Recording> {
  const storage = formatted(options);
  const live = new Uint8Array(options.size);
  if (backing !== undefined) live.set(backing.content.subarray(0, options.size));
  if (filled > 0) {
    live.fill(1, 0, filled);
    const earlier = openSession(storage);
    await perform(earlier, { do: 'write', at: 0, bytes: live.subarray(0, filled) });
    closeSession(earlier);
  }
  const before = storage.copy();
  const recorder = new Recorder(storage);
  const session = openSession(recorder, recorder, backing);
  let state: State = { versions: [live], snapshots: new Map() };
  const allowed = new Map<string, readonly State[]>([['', [state]]]);
  const mark = (label: string, states: readonly State[]): void => {
    allowed.set(label, states);
    recorder.mark(label);
  };
  for (const [index, step] of script.entries()) {
    const action: Action | undefined = resolve(step, state, index);
    if (action === undefined) continue;
    mark(`${index}: in ${action.do}`, during(state, action));
    await perform(session, action);
    state = after(state, action);
    mark(`${index}: after ${action.do}`, [state]);
    expect(difference(contentsOf(session), { ...state, versions: [state.versions.at(-1) as Uint8Array] })).toBe(
      undefined,
    );
  }
  closeSession(session);
  return { before, recorder, allowed };
}

/** Open the file as the next mount does, and hold it against the promises. */
async function expectWhole(
  { file, label, marks }: CrashImage,
  allowed: ReadonlyMap<string, readonly State[]>,
  backing: Backing | undefined,
  second: boolean,
): Promise<void> {
  try {
    const header = readHeader(file);
    // Not marked: nobody will count anew, so that nothing may be wrong, not even a leak.
    if (!isMarked(header)) {
      expect(await checkImage(file.copy(), header)).toMatchObject({ corruptions: 0, leaks: 0 });
    }
    recover(file);
    expect(await checkImage(file, readHeader(file))).toMatchObject({ corruptions: 0, leaks: 0 });
    if (second) qemuCheck(file);
    const session = openSession(file, file, backing);
    const found = contentsOf(session);
    const states = allowed.get(marks.at(-1) ?? '') as readonly State[];
    const differences = states.map((state) => difference(found, state));
    if (!differences.includes(undefined)) throw new Error(differences.join('; or '));
    if (!second) return;
    // And it goes on working.
    await perform(session, { do: 'take', name: 'again' });
    await perform(session, { do: 'write', at: 0, bytes: Uint8Array.of(1, 2, 3) });
    closeSession(session);
    qemuCheck(file);
  } catch (error) {
    throw new Error(`${label}, last mark: ${marks.at(-1)}: ${(error as Error).message}`, { cause: error });
  }
}

/** The same for a crash in the middle of the opening that mends a crash. */
async function expectRepairable(
  image: CrashImage,
  allowed: ReadonlyMap<string, readonly State[]>,
  backing: Backing | undefined,
): Promise<void> {
  const recorder = new Recorder(image.file.copy());
  recover(recorder);
  for (const again of crashImages(image.file, recorder.operations, { samples: 1 })) {
    const label = `${image.label}, then in the repair ${again.label}`;
    await expectWhole({ ...again, label, marks: image.marks }, allowed, backing, false);
  }
}

/** Process deaths looked at per script, and power cuts. */
const IMAGES = { process: 40, power: 60 };

/** Some of the images, evenly: the same ones for the same script. */
async function expectAllWhole(recording: Recording, backing: Pattern, images = IMAGES): Promise<void> {
  const { before, recorder, allowed } = recording;
  const { operations } = recorder;
  for (const kind of ['process', 'power'] as const) {
    let total = 0;
    for (const _ of crashImages(before, operations, { kind, samples: 2 })) total++;
    const every = Math.max(1, total / images[kind]);
    let next = 0;
    let index = 0;
    let looked = 0;
    for (const image of crashImages(before, operations, { kind, samples: 2 })) {
      if (index++ < next) continue;
      next += every;
      if (looked % 20 === 10) await expectRepairable(image, allowed, backing);
      await expectWhole(image, allowed, backing, looked++ % 50 === 20);
    }
  }
}

const variants: [string, FormatOptions, number][] = [
  ['512-byte clusters', { size: 40_448, clusterBytes: 512 }, 0],
  ['512-byte clusters, version 2', { size: 40_448, clusterBytes: 512, version: 2 }, 0],
  [
    '4 KiB clusters over a longer backing file',
    { size: 120_320, clusterBytes: 4096, backing: { file: 'b', format: 'raw' } },
    150_016,
  ],
  [
    'version 2 over a backing file',
    { size: 60_416, clusterBytes: 1024, version: 2, backing: { file: 'b', format: 'raw' } },
    40_000,
  ],
  ['64 KiB clusters', { size: 700_416 }, 0],
  ['64-bit refcounts', { size: 50_176, clusterBytes: 512, refcountBits: 64 }, 0],
  ['subclusters', { size: 200_192, clusterBytes: 16384, extendedL2: true }, 0],
  [
    'subclusters over a backing file',
    { size: 200_192, clusterBytes: 16384, extendedL2: true, backing: { file: 'b', format: 'raw' } },
    150_016,
  ],
  ['preallocated metadata', { size: 120_320, clusterBytes: 4096, preallocation: 'metadata' }, 0],
];

describe('a crash loses nothing that was flushed, brings nothing old back, harms no snapshot', () => {
  it.each(variants)('%s', { timeout: 120_000 * soakFactor }, async (_name, options, backingBytes) => {
    const backing: Pattern = backingBytes > 0 ? patternBacking(backingBytes) : undefined;
    await fc.assert(
      fc.asyncProperty(steps(allKinds, { minLength: 4, maxLength: 14 }), async (script) => {
        const recording = await record(options, script, backing);
        await expectAllWhole(recording, backing);
      }),
      // Shrinking takes minutes; the seed in the message repeats the failure.
      { numRuns: propertyRuns(8), endOnFailure: true },
    );
  });

  it('while refcount blocks are added and their table grows', { timeout: 120_000 }, async () => {
    // 64 refcounts to a block, 64 blocks to a table: 4096 clusters of 512 bytes, nearly all of which are in use.
    const options: FormatOptions = { size: 2_084_864, clusterBytes: 512, refcountBits: 64 };
    const step = { at: 0, seed: 1, length: 0 };
    const script: Step[] = [
      { ...step, do: 'write', at: 0.95, length: 0.97, seed: 2 },
      { ...step, do: 'flush' },
      { ...step, do: 'write', at: 0.94, length: 0.7, seed: 3 },
    ];
    const recording = await record(options, script, undefined, 1_950_000);
    const { refcountTableClusters } = readHeader(recording.before);
    expect(readHeader(recording.recorder).refcountTableClusters).toBeGreaterThan(refcountTableClusters);
    await expectAllWhole(recording, undefined);
  });

  it('while a snapshot comes to share a mapping, or lets go of it, table by table', { timeout: 120_000 }, async () => {
    // 18 L2 tables, all in use: more than are shared behind the closed gate.
    const options: FormatOptions = { size: 18 * 32_768, clusterBytes: 512 };
    const step = { at: 0, seed: 1, length: 0 };
    const script: Step[] = [
      { ...step, do: 'take' },
      { ...step, do: 'write', at: 0.3, length: 0.2, seed: 2 },
      { ...step, do: 'take' },
      { ...step, do: 'discard', at: 0.1, length: 0.3 },
      { ...step, do: 'delete', at: 0 },
      { ...step, do: 'rollback', at: 0 },
      { ...step, do: 'delete', at: 0 },
    ];
    const recording = await record(options, script, undefined, options.size);
    await expectAllWhole(recording, undefined, { process: 40, power: 40 });
  });

  it.each<[string, FormatOptions]>([
    ['version 3', { size: 6 * 32_768, clusterBytes: 512 }],
    ['version 2', { size: 6 * 32_768, clusterBytes: 512, version: 2 }],
  ])('while the tail moves down and the file is cut off: %s', { timeout: 120_000 }, async (_name, options) => {
    const step = { at: 0, seed: 1, length: 0 };
    const script: Step[] = [
      { ...step, do: 'take' },
      { ...step, do: 'write', at: 0.3, length: 0.8, seed: 2 },
      { ...step, do: 'take' },
      { ...step, do: 'write', at: 0.5, length: 0.6, seed: 3 },
      { ...step, do: 'discard', at: 0.8, length: 0.4 },
      // The first one: what only it held lies low in the file.
      { ...step, do: 'delete', seed: 2 },
      { ...step, do: 'compact' },
      { ...step, do: 'write', at: 0.1, length: 0.4, seed: 4 },
    ];
    const recording = await record(options, script, undefined, options.size);
    expect(recording.recorder.operations.some(({ kind }) => kind === 'truncate')).toBe(true);
    await expectAllWhole(recording, undefined, { process: 120, power: 120 });
  });
});
