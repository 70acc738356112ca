/** Contents stay, the file gets as short as what it holds, and qemu-img check finds nothing. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { compactImage } from '../../../src/qcow2/compact/compact.ts';
import { surveySpace } from '../../../src/qcow2/compact/host-space.ts';
import type { FormatOptions } from '../../../src/qcow2/create.ts';
import { zeroRange } from '../../../src/qcow2/discard.ts';
import { flush } from '../../../src/qcow2/flush.ts';
import { readRange } from '../../../src/qcow2/read.ts';
import type { SnapshotEntry } from '../../../src/qcow2/snapshot-table.ts';
import { readSnapshotL1 } from '../../../src/qcow2/snapshots.ts';
import type { MemoryStorage } from '../../storage/memory-storage.ts';
import {
  closeSession,
  formatted,
  openSession,
  type Pattern,
  patternBacking,
  qemuCheck,
  type Session,
} from '../model.ts';
import { after, allKinds, contentsOf, difference, perform, resolve, type State, type Step, steps } from '../script.ts';

const progress = (): void => {};

async function run(session: Session, state: State, script: readonly Step[]): Promise<State> {
  let now = state;
  for (const [index, step] of script.entries()) {
    const action = resolve(step, now, index);
    if (action === undefined) continue;
    await perform(session, action);
    now = after(now, action);
  }
  return now;
}

/** Clusters that a table may miss for want of adjacent holes, and a refcount block that a pass came too late to drop. */
async function expectShort({ image, storage }: Session, slack: number): Promise<void> {
  flush(image);
  const { used, end } = await surveySpace(image, 0);
  expect(Math.ceil(storage.size() / image.geometry.clusterBytes)).toBeLessThanOrEqual(Math.max(used + slack, 0));
  expect(end).toBeLessThanOrEqual(used + slack);
}

async function compacted(
  options: FormatOptions,
  script: readonly Step[],
  backing: Pattern,
  punches: boolean,
): Promise<void> {
  const storage = formatted(options, punches);
  let session = openSession(storage, storage, backing);
  const live = new Uint8Array(options.size);
  if (backing !== undefined) live.set(backing.content.subarray(0, options.size));
  const state = await run(session, { versions: [live], snapshots: new Map() }, script);
  const exact: State = { ...state, versions: [state.versions.at(-1) as Uint8Array] };
  const before = storage.size();
  await compactImage(session.image, session.list, { progress });
  expect(storage.size()).toBeLessThanOrEqual(before);
  expect(difference(contentsOf(session), exact)).toBe(undefined);
  await expectShort(session, 2);
  // Again: nothing to do, and nothing done.
  const size = storage.size();
  await compactImage(session.image, session.list, { progress });
  expect(storage.size()).toBe(size);
  closeSession(session);
  qemuCheck(storage);
  session = openSession(storage, storage, backing);
  expect(difference(contentsOf(session), exact)).toBe(undefined);
  closeSession(session);
}

const variants: [string, FormatOptions, number, boolean][] = [
  ['512-byte clusters', { size: 100_352, clusterBytes: 512 }, 0, true],
  ['a host that cannot punch', { size: 100_352, clusterBytes: 512 }, 0, false],
  [
    'version 2 over a backing file',
    { size: 90_112, clusterBytes: 1024, version: 2, backing: { file: 'b', format: 'raw' } },
    40_000,
    true,
  ],
  ['64 KiB clusters', { size: 1_400_320 }, 0, true],
  ['64-bit refcounts', { size: 150_016, clusterBytes: 512, refcountBits: 64 }, 0, true],
  ['8-bit refcounts', { size: 150_016, clusterBytes: 512, refcountBits: 8 }, 0, true],
  ['subclusters', { size: 600_064, clusterBytes: 16384, extendedL2: true }, 0, true],
  ['preallocated metadata', { size: 300_032, clusterBytes: 4096, preallocation: 'metadata' }, 0, true],
];

describe('compacting', () => {
  it.each(variants)(
    'keeps the disk and every snapshot, and makes the file short: %s',
    async (_name, options, backingBytes, punches) => {
      const backing = backingBytes > 0 ? patternBacking(backingBytes) : undefined;
      await fc.assert(
        fc.asyncProperty(steps(allKinds, { minLength: 4, maxLength: 25 }), (script) =>
          compacted(options, script, backing, punches),
        ),
        { numRuns: 15 },
      );
    },
  );

  it('touches nothing where nothing can be gained', async () => {
    const storage = formatted({ size: 100_352, clusterBytes: 512 });
    const session = openSession(storage);
    await perform(session, { do: 'write', at: 0, bytes: new Uint8Array(50_000).fill(7) });
    closeSession(session);
    const before = storage.bytes();
    const again = openSession(storage);
    expect(await compactImage(again.image, again.list, { progress })).toEqual({ finished: true, clustersMoved: 0 });
    closeSession(again);
    expect(Buffer.compare(before, storage.bytes())).toBe(0);
  });

  it('keeps up what readers of a snapshot have in memory', async () => {
    const { storage, session, live } = halfEmpty();
    const { image, list } = session;
    await perform(session, { do: 'take', name: 'low' });
    live.fill(9);
    await perform(session, { do: 'write', at: 0, bytes: live.slice() });
    await perform(session, { do: 'take', name: 'high' });
    const high = list.entries[1] as SnapshotEntry;
    const open = readSnapshotL1(image, high);
    const { l1TableOffset } = high;
    await perform(session, { do: 'delete', name: 'low' });
    await compactImage(image, list, { progress });
    expect(high.l1TableOffset).toBeLessThan(l1TableOffset);
    // What was left is in other use by then.
    await perform(session, { do: 'write', at: 0, bytes: live.slice().fill(5) });
    const got = new Uint8Array(live.length);
    readRange(image, open, got, 0, got.length, 0);
    expect(Buffer.compare(got, live)).toBe(0);
    closeSession(session);
    qemuCheck(storage);
  });

  it('stops when it is told to, and goes on from there', async () => {
    const { storage, session, live } = halfEmpty();
    const stop = new AbortController();
    const report = await compactImage(session.image, session.list, {
      progress: () => stop.abort(),
      stop: () => stop.signal.aborted,
    });
    expect(report.finished).toBe(false);
    expect(report.clustersMoved).toBeGreaterThan(0);
    expect(difference(contentsOf(session), { versions: [live], snapshots: new Map() })).toBe(undefined);
    await compactImage(session.image, session.list, { progress });
    expect(difference(contentsOf(session), { versions: [live], snapshots: new Map() })).toBe(undefined);
    await expectShort(session, 2);
    closeSession(session);
    qemuCheck(storage);
  });
});

/** Every other cluster of a full disk is free again. */
function halfEmpty(): { storage: MemoryStorage; session: Session; live: Uint8Array } {
  const size = 4 * 2 ** 20;
  const storage = formatted({ size, clusterBytes: 512 });
  const session = openSession(storage);
  const live = new Uint8Array(size).map((_, at) => 1 + (at % 251));
  void perform(session, { do: 'write', at: 0, bytes: live.slice() });
  for (let at = 0; at < size; at += 1024) {
    expect(zeroRange(session.image, at, 512, 'free')).toBe(true);
    live.fill(0, at, at + 512);
  }
  return { storage, session, live };
}
