/** A host that fails (a full disk, an I/O error) at any change of any operation: told, undone, and mended at the latest by the next mount. */
import { describe, expect, it } from 'vitest';
import { type Errno, FsError } from '../../src/errors.ts';
import { checkImage } from '../../src/qcow2/check.ts';
import type { FormatOptions } from '../../src/qcow2/create.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import { isMarked } from '../../src/qcow2/session-mark.ts';
import type { MemoryStorage } from '../storage/memory-storage.ts';
import { Recorder } from '../storage/recorder.ts';
import { closeSession, formatted, openSession, type Pattern, patternBacking, qemuCheck, recover } from './model.ts';
import { type Action, after, contentsOf, difference, during, perform, type State } from './script.ts';

const KIB = 1024;

const bytes = (length: number, byte: number): Uint8Array => new Uint8Array(length).fill(byte);

interface Variant {
  readonly name: string;
  readonly options: FormatOptions;
  readonly backingBytes: number;
}

const variants: readonly Variant[] = [
  { name: 'version 3, 512-byte clusters', options: { size: 60_416, clusterBytes: 512 }, backingBytes: 0 },
  { name: 'version 2, 512-byte clusters', options: { size: 60_416, clusterBytes: 512, version: 2 }, backingBytes: 0 },
  {
    name: 'subclusters over a backing file',
    options: { size: 300_032, clusterBytes: 16384, extendedL2: true, backing: { file: 'b', format: 'raw' } },
    backingBytes: 350_208,
  },
];

/** What is done to the disk before the operation that fails. */
const preparation: readonly Action[] = [
  // What it held alone is free again, at the start of the file.
  { do: 'write', at: 0, bytes: bytes(30 * KIB, 8) },
  { do: 'take', name: 'gone' },
  { do: 'write', at: 0, bytes: bytes(30 * KIB, 1) },
  { do: 'delete', name: 'gone' },
  { do: 'take', name: 'first' },
  { do: 'write', at: 5 * KIB, bytes: bytes(10 * KIB, 2) },
  { do: 'take', name: 'second' },
  { do: 'write', at: 7 * KIB, bytes: bytes(3 * KIB, 3) },
];

const operations: readonly Action[] = [
  { do: 'write', at: 8 * KIB + 100, bytes: bytes(20 * KIB, 4) },
  { do: 'write', at: 50 * KIB, bytes: bytes(5 * KIB, 5) },
  { do: 'discard', at: 3 * KIB + 7, length: 30 * KIB },
  { do: 'zero', at: 3 * KIB + 7, length: 30 * KIB },
  { do: 'flush' },
  { do: 'take', name: 'third' },
  { do: 'delete', name: 'first' },
  { do: 'delete', name: 'second' },
  { do: 'rename', name: 'first', to: 'renamed' },
  { do: 'rollback', name: 'first' },
  { do: 'grow', size: 2_000_384 },
  { do: 'shrink', size: 20 * KIB },
  { do: 'compact' },
];

interface Prepared {
  readonly storage: MemoryStorage;
  readonly state: State;
  readonly backing: Pattern;
}

async function prepare({ options, backingBytes }: Variant): Promise<Prepared> {
  const backing = backingBytes > 0 ? patternBacking(backingBytes) : undefined;
  const storage = formatted(options);
  const session = openSession(storage, storage, backing);
  const live = new Uint8Array(options.size);
  if (backing !== undefined) live.set(backing.content.subarray(0, options.size));
  let state: State = { versions: [live], snapshots: new Map() };
  for (const action of preparation) {
    await perform(session, action);
    state = after(state, action);
  }
  closeSession(session);
  return { storage, state: { ...state, versions: state.versions.slice(-1) }, backing };
}

const expectOneOf = (found: State, allowed: readonly State[], when: string): void => {
  const differences = allowed.map((state) => difference(found, state));
  if (!differences.includes(undefined)) throw new Error(`${when}: ${differences.join('; or ')}`);
};

const newest = (state: State): State => ({ ...state, versions: state.versions.slice(-1) });

/** States that a failed operation may leave: all but these are undone. A deleted snapshot whose clusters cannot be freed stays deleted. */
const mayBePartial: readonly Action['do'][] = ['write', 'discard', 'zero', 'shrink', 'delete'];
const allowedAfterFailure = (state: State, action: Action): readonly State[] =>
  mayBePartial.includes(action.do) ? during(state, action) : [state];

/**
 * Run the operation with the change `at` failing.
 * @returns false if it has fewer changes, so that none failed
 */
async function failAt(
  { storage, state, backing }: Prepared,
  action: Action,
  failure: { readonly at: number; readonly how: Errno; readonly times: number },
): Promise<boolean> {
  const file = storage.copy();
  const recorder = new Recorder(file);
  const session = openSession(recorder, recorder, backing);
  // The operation finds unflushed changes.
  const dirty: Action = { do: 'write', at: KIB, bytes: bytes(600, 9) };
  await perform(session, dirty);
  const before = newest(after(state, dirty));
  const { changes } = recorder;
  recorder.fail(failure);
  let error: unknown;
  try {
    await perform(session, action);
  } catch (caught) {
    error = caught;
  }
  recorder.fail(undefined);
  const none = error === undefined && recorder.changes - changes <= failure.at;
  if (error !== undefined) {
    if (!(error instanceof FsError)) throw error;
    expect([failure.how, 'EIO']).toContain(error.errno);
    expect(error.message).toMatch(/^[^\n]{20,}$/);
  }

  // A failure that does no harm (a hole that is not punched, tidying up behind the last step) is not told.
  const allowed = error === undefined ? [newest(after(before, action))] : allowedAfterFailure(before, action);
  const found = contentsOf(session);
  expectOneOf(found, allowed, 'in memory');

  // Further use: possible, or refused.
  const probe: Action = { do: 'write', at: 12 * KIB, bytes: bytes(9 * KIB, 7) };
  let states: readonly State[] = allowed;
  try {
    await perform(session, probe);
    await perform(session, { do: 'flush' });
    await perform(session, { do: 'take', name: 'probe' });
    states = [after(after(newest(found), probe), { do: 'take', name: 'probe' })];
    expectOneOf(contentsOf(session), states, 'after further use');
  } catch (refusal) {
    if (!(refusal instanceof FsError) || refusal.errno !== 'EIO') throw refusal;
    expect(refusal.message).toMatch(/not written any more/);
    // Nobody knows what reached the file.
    const done = after(before, action);
    states = [...during({ ...before, versions: [...state.versions, ...before.versions] }, action), before, done, state];
  }
  closeSession(session);

  const header = readHeader(file);
  if (!isMarked(header)) {
    expect(await checkImage(file.copy(), header)).toMatchObject({ corruptions: 0, leaks: 0 });
  }
  recover(file);
  expect(await checkImage(file.copy(), readHeader(file))).toMatchObject({ corruptions: 0, leaks: 0 });
  if (failure.at % 8 === 3) qemuCheck(file);
  const again = openSession(file, file, backing);
  expectOneOf(contentsOf(again), states, 'opened again');
  return !none;
}

describe('a host that fails in the middle of an operation', () => {
  describe.each(variants)('$name', (variant) => {
    it.each(
      operations.flatMap((action) =>
        (['ENOSPC', 'EIO'] as const).map((how): [string, Errno, Action] => [
          `${action.do}${'name' in action ? ` ${action.name}` : ''}${'at' in action ? ` at ${action.at}` : ''}`,
          how,
          action,
        ]),
      ),
    )('%s: %s', async (_name, how, action) => {
      const prepared = await prepare(variant);
      const failures: string[] = [];
      for (const times of [1, Number.POSITIVE_INFINITY]) {
        for (let at = 0; ; at++) {
          try {
            if (!(await failAt(prepared, action, { at, how, times }))) break;
          } catch (error) {
            failures.push(`change ${at}${times === 1 ? '' : ' and all behind it'}: ${(error as Error).message}`);
            if (failures.length > 100) break;
          }
        }
      }
      expect(failures).toEqual([]);
    });
  });
});
