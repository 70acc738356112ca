/** A host disk that is full takes what the file has room for, and no more: nothing is lost by it, and space can be had again. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { checkImage } from '../../src/qcow2/check.ts';
import type { FormatOptions } from '../../src/qcow2/create.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import { propertyRuns } from '../property-runs.ts';
import { PAGE_BYTES } from '../storage/memory-storage.ts';
import { closeSession, formatted, openSession, qemuCheck, recover } from './model.ts';
import {
  allKinds,
  contentsOf,
  difference,
  during,
  perform,
  resolve,
  after as result,
  type State,
  steps,
} from './script.ts';

const newest = (state: State): State => ({ ...state, versions: state.versions.slice(-1) });

// A cluster is what the host allocates.
const variants: [string, FormatOptions][] = [
  ['version 3', { size: 12 * PAGE_BYTES, clusterBytes: PAGE_BYTES }],
  ['version 2', { size: 12 * PAGE_BYTES, clusterBytes: PAGE_BYTES, version: 2 }],
  ['preallocated metadata', { size: 12 * PAGE_BYTES, clusterBytes: PAGE_BYTES, preallocation: 'metadata' }],
  ['clusters that share what the host allocates', { size: 12 * PAGE_BYTES, clusterBytes: PAGE_BYTES / 8 }],
  ['subclusters', { size: 12 * PAGE_BYTES, clusterBytes: PAGE_BYTES, extendedL2: true }],
];

describe('on a host that becomes full', () => {
  it.each(variants)(
    'all goes on where there is room, and the newest snapshot can always be deleted: %s',
    async (_name, options) => {
      await fc.assert(
        fc.asyncProperty(
          steps(allKinds, { minLength: 5, maxLength: 20 }),
          fc.integer({ min: 0, max: 40 }),
          async (script, freePages) => {
            const storage = formatted(options);
            storage.freePages = freePages;
            const session = openSession(storage);
            let state: State = { versions: [new Uint8Array(options.size)], snapshots: new Map() };
            const expectState = (when: string, ...allowed: State[]): void => {
              const found = contentsOf(session);
              const differences = allowed.map((one) => difference(found, one));
              if (!differences.includes(undefined)) throw new Error(`${when}: ${differences.join('; or ')}`);
              state = found;
            };
            for (const [index, step] of script.entries()) {
              const action = resolve(step, state, index);
              if (action === undefined) continue;
              try {
                await perform(session, action);
                expectState(action.do, newest(result(state, action)));
              } catch (error) {
                // Never EIO: that is an image that is not written any more.
                if (!(error instanceof FsError) || error.errno !== 'ENOSPC') throw error;
                expectState(`${action.do}, which failed`, state, ...during(state, action));
              }
            }
            storage.freePages = 0;
            for (let last = session.list.entries.at(-1); last !== undefined; last = session.list.entries.at(-1)) {
              await perform(session, { do: 'delete', name: last.name });
              expectState('delete', result(state, { do: 'delete', name: last.name }));
              storage.freePages = 0;
            }
            closeSession(session);
            recover(storage);
            expect(await checkImage(storage.copy(), readHeader(storage))).toMatchObject({ corruptions: 0, leaks: 0 });
            if (script.length % 8 === 0) qemuCheck(storage);
            const again = openSession(storage);
            expect(difference(contentsOf(again), state)).toBe(undefined);
          },
        ),
        { numRuns: propertyRuns(30) },
      );
    },
  );
});
