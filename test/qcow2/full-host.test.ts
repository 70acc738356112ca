/** A host disk that is full takes what the file has room for, and no more: nothing is lost by it, and space can be had again. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { checkImage } from '../../src/qcow2/check.ts';
import type { FormatOptions } from '../../src/qcow2/create.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import { propertyRuns } from '../property-runs.ts';
import { type MemoryStorage, PAGE_BYTES } from '../storage/memory-storage.ts';
import { closeSession, formatted, openSession, qemuCheck, recover, type Session } from './model.ts';
import {
  allKinds,
  contentsOf,
  difference,
  during,
  perform,
  resolve,
  after as result,
  type State,
  type Step,
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

/** An open disk, and what it must hold. */
class Run {
  readonly storage: MemoryStorage;
  readonly session: Session;
  state: State;

  constructor(options: FormatOptions, freePages: number) {
    this.storage = formatted(options);
    this.storage.freePages = freePages;
    this.session = openSession(this.storage);
    this.state = { versions: [new Uint8Array(options.size)], snapshots: new Map() };
  }

  /** Nothing else may go wrong than that there is no room; EIO would be an image that is not written any more. */
  async step(step: Step, index: number): Promise<void> {
    const action = resolve(step, this.state, index);
    if (action === undefined) return;
    try {
      await perform(this.session, action);
      this.#expect(action.do, newest(result(this.state, action)));
    } catch (error) {
      if (!(error instanceof FsError) || error.errno !== 'ENOSPC') throw error;
      this.#expect(`${action.do}, which failed`, this.state, ...during(this.state, action));
    }
  }

  async delete(name: string): Promise<void> {
    await perform(this.session, { do: 'delete', name });
    this.#expect('delete', result(this.state, { do: 'delete', name }));
  }

  async end(withQemu: boolean): Promise<void> {
    closeSession(this.session);
    recover(this.storage);
    const found = await checkImage(this.storage.copy(), readHeader(this.storage));
    expect(found).toMatchObject({ corruptions: 0, leaks: 0 });
    if (withQemu) qemuCheck(this.storage);
    expect(difference(contentsOf(openSession(this.storage)), this.state)).toBe(undefined);
  }

  #expect(when: string, ...allowed: State[]): void {
    const found = contentsOf(this.session);
    const differences = allowed.map((one) => difference(found, one));
    if (!differences.includes(undefined)) throw new Error(`${when}: ${differences.join('; or ')}`);
    this.state = found;
  }
}

describe('on a host that becomes full', () => {
  it.each(variants)(
    'all goes on where there is room, and the newest snapshot can always be deleted: %s',
    async (_name, options) => {
      await fc.assert(
        fc.asyncProperty(
          steps(allKinds, { minLength: 5, maxLength: 20 }),
          fc.integer({ min: 0, max: 40 }),
          async (script, freePages) => {
            const run = new Run(options, freePages);
            for (const [index, step] of script.entries()) await run.step(step, index);
            const { entries } = run.session.list;
            for (const { name } of entries.toReversed()) {
              run.storage.freePages = 0;
              await run.delete(name);
            }
            await run.end(script.length % 8 === 0);
          },
        ),
        { numRuns: propertyRuns(30) },
      );
    },
  );

  const kinds = ['write', 'write', 'write', 'discard', 'zero', 'flush'] as const;

  it.each(variants)(
    'and that copies on write: reads and writes go on when it has room again, with all that was taken: %s',
    async (_name, options) => {
      await fc.assert(
        fc.asyncProperty(
          fc.array(
            fc.record({
              script: steps(kinds, { minLength: 1, maxLength: 5 }),
              room: fc.constantFrom(0, 1, 2, 3, 5, 8, 1000),
            }),
            {
              minLength: 2,
              maxLength: 6,
            },
          ),
          steps(allKinds, { minLength: 0, maxLength: 4 }),
          async (parts, before) => {
            const run = new Run(options, Number.POSITIVE_INFINITY);
            run.storage.copiesOnWrite = true;
            for (const [index, step] of before.entries()) await run.step(step, index);
            for (const { script, room } of parts) {
              run.storage.freePages = room;
              for (const [index, step] of script.entries()) await run.step(step, index);
            }
            run.storage.freePages = Number.POSITIVE_INFINITY;
            await run.step({ do: 'flush', at: 0, length: 0, seed: 1 }, 0);
            await run.end(before.length === 0);
          },
        ),
        { numRuns: propertyRuns(30) },
      );
    },
  );
});
