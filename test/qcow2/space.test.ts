/** What is said to be a snapshot's own is what deleting it gives back. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { FormatOptions } from '../../src/qcow2/create.ts';
import { flush } from '../../src/qcow2/flush.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import { readSnapshotTable } from '../../src/qcow2/snapshot-table.ts';
import { imageSpace } from '../../src/qcow2/space.ts';
import { atOnce } from '../../src/qcow2/steps.ts';
import type { Storage } from '../../src/storage/storage.ts';
import { propertyRuns } from '../property-runs.ts';
import type { MemoryStorage } from '../storage/memory-storage.ts';
import { closeSession, formatted, openSession } from './model.ts';
import { after, allKinds, perform, resolve, type State, steps } from './script.ts';

const spaceOf = (storage: Storage, window?: number) => {
  const header = readHeader(storage);
  const { entries } = readSnapshotTable(storage, header);
  return { space: atOnce(imageSpace(storage, header, entries, window)), entries };
};

/** Clusters with a refcount, by the refcount blocks themselves. */
function clustersInUse(storage: MemoryStorage): number {
  const { refcountTableOffset, refcountTableClusters, clusterBytes } = readHeader(storage);
  const bytes = storage.bytes();
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  let used = 0;
  for (let at = refcountTableOffset; at < refcountTableOffset + refcountTableClusters * clusterBytes; at += 8) {
    const block = Number(view.getBigUint64(at));
    for (let entry = block; block !== 0 && entry < block + clusterBytes; entry += 2)
      if (view.getUint16(entry) > 0) used++;
  }
  return used;
}

const options: [string, FormatOptions][] = [
  ['512-byte clusters', { size: 100_352, clusterBytes: 512 }],
  ['version 2', { size: 60_416, clusterBytes: 1024, version: 2 }],
  ['subclusters', { size: 400_384, clusterBytes: 16384, extendedL2: true }],
];

describe('own is what a delete frees', () => {
  it.each(options)('%s', async (_name, format) => {
    const kinds = allKinds.filter((kind) => kind !== 'shrink');
    await fc.assert(
      fc.asyncProperty(steps(kinds, { minLength: 6, maxLength: 16 }), async (script) => {
        const storage = formatted(format);
        const session = openSession(storage);
        let state: State = { versions: [new Uint8Array(format.size)], snapshots: new Map() };
        for (const [index, step] of script.entries()) {
          const action = resolve(step, state, index);
          if (action === undefined) continue;
          await perform(session, action);
          state = after(state, action);
        }
        closeSession(session);
        const { space, entries } = spaceOf(storage);
        expect(spaceOf(storage, 7).space).toEqual(space);
        for (const [index, entry] of entries.entries()) {
          const copy = storage.copy();
          const { own, shared } = space.snapshots[index]!;
          expect(shared).toBeGreaterThanOrEqual(0);
          const again = openSession(copy);
          const before = clustersInUse(copy);
          await perform(again, { do: 'delete', name: entry.name });
          closeSession(again);
          // The snapshot table goes with the last snapshot.
          const table = entries.length === 1 ? 1 : 0;
          expect({ name: entry.name, freed: before - clustersInUse(copy) }).toEqual({
            name: entry.name,
            freed: own / readHeader(storage).clusterBytes + table,
          });
        }
      }),
      { numRuns: propertyRuns(25) },
    );
  });
});

it('counts while the disk goes on: the session flushed, the mark still there', async () => {
  const storage = formatted({ size: 2 ** 20, clusterBytes: 4096 });
  const session = openSession(storage);
  const bytes = new Uint8Array(40_960).fill(3);
  await perform(session, { do: 'write', at: 0, bytes });
  await perform(session, { do: 'take', name: 'a' });
  await perform(session, { do: 'write', at: 0, bytes: bytes.subarray(0, 8192) });
  flush(session.image);
  const { space } = spaceOf(storage);
  // Two data clusters, its L1 table, its L2 table.
  expect(space.snapshots).toEqual([{ own: 4 * 4096, shared: 8 * 4096, freed: expect.any(Number) }]);
  expect(space.live).toMatchObject({ own: 4 * 4096, shared: 8 * 4096 });
  closeSession(session);
});
