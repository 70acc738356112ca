/** Contents stay, the file gets as short as what it holds, and qemu-img check finds nothing. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { allocate } from '../../../src/qcow2/allocator.ts';
import { compactImage } from '../../../src/qcow2/compact/compact.ts';
import { surveySpace } from '../../../src/qcow2/compact/host-space.ts';
import type { FormatOptions } from '../../../src/qcow2/create.ts';
import { zeroRange } from '../../../src/qcow2/discard.ts';
import { flush } from '../../../src/qcow2/flush.ts';
import { readRange } from '../../../src/qcow2/read.ts';
import { changeRefcount } from '../../../src/qcow2/refcounts.ts';
import type { SnapshotEntry } from '../../../src/qcow2/snapshot-table.ts';
import { readSnapshotL1 } from '../../../src/qcow2/snapshots.ts';
import { propertyRuns } from '../../property-runs.ts';
import { MemoryStorage } from '../../storage/memory-storage.ts';
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
        { numRuns: propertyRuns(15) },
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

  it.each(['zlib', 'zstd'])('packs compressed data, whatever shares a cluster with it: %s', async (compression) => {
    await withImage(['-o', `compression_type=${compression},cluster_size=4k`], async (path) => {
      const noise = readFileSync(path.replace(/[^/]*$/, 'noise'));
      const storage = MemoryStorage.load(path);
      const session = openSession(storage);
      const state = contentsOf(session);
      expect(
        liveOf(state)
          .subarray(0, noise.length)
          .some((byte) => byte !== 0),
      ).toBe(true);
      const { used } = await surveySpace(session.image, 0);
      const before = storage.size();
      const { clustersMoved } = await compactImage(session.image, session.list, { progress });
      expect(clustersMoved).toBeGreaterThan(20);
      expect(storage.size()).toBeLessThan(before);
      await expectShort(session, 2);
      // No more clusters than before: what lay in one still does.
      expect((await surveySpace(session.image, 0)).used).toBeLessThanOrEqual(used + 1);
      expect(difference(contentsOf(session), state)).toBe(undefined);
      closeSession(session);
      qemuCheck(storage);
    });
  });

  it('leaves bitmaps where they are, and usable', async () => {
    await withImage(['-o', 'cluster_size=4k'], async (path) => {
      execFileSync('qemu-img', ['bitmap', '--add', '-f', 'qcow2', path, 'backup']);
      qemuIo(path, 'write -q -P 8 300k 100k', 'discard 100k 90k', 'write -q -P 9 900k 100k', 'discard 300k 100k');
      const storage = MemoryStorage.load(path);
      const session = openSession(storage);
      const state = contentsOf(session);
      await compactImage(session.image, session.list, { progress });
      expect(difference(contentsOf(session), state)).toBe(undefined);
      closeSession(session);
      qemuCheck(storage);
      storage.save(path);
      const info = execFileSync('qemu-img', ['info', '-f', 'qcow2', path], { encoding: 'utf8' });
      expect(info).toMatch(/name: backup/);
      expect(info).not.toMatch(/inconsistent/);
    });
  });

  it('a cluster that nothing refers to, and one that two claim, stay', async () => {
    const { storage, session } = halfEmpty();
    closeSession(session);
    const leaky = openSession(storage);
    const state = contentsOf(leaky);
    leaky.image.lock();
    allocate(leaky.image, 1);
    changeRefcount(leaky.image, Math.floor(storage.size() / 512) - 1, 1);
    leaky.image.unlock();
    const size = storage.size();
    await compactImage(leaky.image, leaky.list, { progress });
    expect(storage.size()).toBe(size);
    expect(difference(contentsOf(leaky), state)).toBe(undefined);
    leaky.image.lock();
    changeRefcount(leaky.image, Math.floor(storage.size() / 512) - 1, -1);
    leaky.image.unlock();
    await compactImage(leaky.image, leaky.list, { progress });
    expect(storage.size()).toBeLessThan(size);
    expect(difference(contentsOf(leaky), state)).toBe(undefined);
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

const liveOf = (state: State): Uint8Array => state.versions.at(-1) as Uint8Array;

function qemuIo(path: string, ...commands: string[]): void {
  execFileSync('qemu-io', ['-f', 'qcow2', '-d', 'unmap', ...commands.flatMap((command) => ['-c', command]), path]);
}

/** An image made by qemu-img: free space, behind it compressed data of many sizes, which a snapshot shares in part. */
async function withImage(options: readonly string[], body: (path: string) => Promise<void>): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'vdskfs-compact-'));
  try {
    const path = join(folder, 'image.qcow2');
    const noise = new Uint8Array(400 * 1024);
    let seed = 7;
    for (let at = 0; at < noise.length; at++) {
      seed = (Math.imul(seed, 1_664_525) + 1_013_904_223) >>> 0;
      // Each cluster compresses to another size.
      noise[at] = at % 4096 < ((at >>> 12) * 67) % 3800 ? seed >>> 24 : 1;
    }
    writeFileSync(join(folder, 'noise'), noise);
    execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', ...options, path, '1M']);
    qemuIo(path, 'write -q -P 5 600k 300k');
    execFileSync('qemu-img', ['convert', '-n', '-c', '-f', 'raw', '-O', 'qcow2', join(folder, 'noise'), path]);
    qemuIo(path, 'discard 600k 280k');
    execFileSync('qemu-img', ['snapshot', '-c', 'one', path]);
    qemuIo(path, 'write -q -P 6 200k 60k', 'discard 0 40k');
    await body(path);
  } finally {
    rmSync(folder, { recursive: true });
  }
}
