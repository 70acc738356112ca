/** Random scripts for an engine, and what a disk may hold at each moment of one: for tests that crash or fail in between. */
import fc from 'fast-check';
import { expect } from 'vitest';
import { compactImage } from '../../src/qcow2/compact/compact.ts';
import { zeroRange } from '../../src/qcow2/discard.ts';
import { flushIfRoom } from '../../src/qcow2/flush.ts';
import { readRange } from '../../src/qcow2/read.ts';
import { growDisk, shrinkDisk } from '../../src/qcow2/resize.ts';
import type { SnapshotEntry } from '../../src/qcow2/snapshot-table.ts';
import { applySnapshot, deleteSnapshot, readSnapshotL1, renameSnapshot } from '../../src/qcow2/snapshots.ts';
import { takeSnapshot } from '../../src/qcow2/take-snapshot.ts';
import { writeRange } from '../../src/qcow2/write.ts';
import type { Session } from './model.ts';

/** A step with its places as fractions: they get numbers when the size of the disk is known. */
export interface Step {
  readonly do:
    | 'write'
    | 'discard'
    | 'zero'
    | 'flush'
    | 'take'
    | 'delete'
    | 'rename'
    | 'rollback'
    | 'grow'
    | 'shrink'
    | 'compact';
  readonly at: number;
  readonly length: number;
  readonly seed: number;
}

const fraction = fc.double({ min: 0, max: 1, noNaN: true });

/** @param kinds what may happen, each as often as it is named */
export function steps(kinds: readonly Step['do'][], length: { minLength: number; maxLength: number }) {
  const step = fc.record({
    do: fc.constantFrom(...kinds),
    at: fraction,
    length: fraction,
    seed: fc.integer({ min: 1, max: 0x7fff_ffff }),
  });
  return fc.array(step, length);
}

export const allKinds: readonly Step['do'][] = [
  ...(['write', 'write', 'write', 'write', 'write', 'write', 'discard', 'discard', 'zero', 'flush', 'flush'] as const),
  ...(['take', 'take', 'take', 'delete', 'rename', 'rollback', 'grow', 'shrink', 'compact'] as const),
];

/** What a disk may hold. */
export interface State {
  /** Each byte reads as it is in one of these, all of one size: the last flush, and every change since; the last one is what reads see. */
  readonly versions: readonly Uint8Array[];
  readonly snapshots: ReadonlyMap<string, Uint8Array>;
}

export type Action =
  | { readonly do: 'write'; readonly at: number; readonly bytes: Uint8Array }
  | { readonly do: 'discard' | 'zero'; readonly at: number; readonly length: number }
  | { readonly do: 'flush' | 'compact' }
  | { readonly do: 'take' | 'delete' | 'rollback'; readonly name: string }
  | { readonly do: 'rename'; readonly name: string; readonly to: string }
  | { readonly do: 'grow' | 'shrink'; readonly size: number };

const liveOf = (state: State): Uint8Array => state.versions.at(-1) as Uint8Array;

/** The step with the numbers that fit the disk; undefined if it cannot be done (nothing to delete). */
export function resolve(step: Step, state: State, index: number): Action | undefined {
  const size = liveOf(state).length;
  const at = Math.floor(step.at * (size - 1));
  const names = [...state.snapshots.keys()];
  const name = names[step.seed % Math.max(1, names.length)];
  switch (step.do) {
    case 'write':
      return { do: 'write', at, bytes: pattern(Math.max(1, Math.floor(step.length ** 4 * (size - at))), step.seed) };
    case 'discard':
    case 'zero':
      return { do: step.do, at, length: Math.max(1, Math.floor(step.length * (size - at))) };
    case 'flush':
    case 'compact':
      return { do: step.do };
    case 'take':
      return names.length < 3 ? { do: 'take', name: `s${index}` } : undefined;
    case 'rename':
      return name === undefined ? undefined : { do: 'rename', name, to: `r${index}` };
    case 'delete':
    case 'rollback':
      return name === undefined ? undefined : { do: step.do, name };
    case 'grow':
      return { do: 'grow', size: size + 512 * (1 + (step.seed % 200)) };
    case 'shrink': {
      // To a smaller size only: a call that leaves the size alone makes nothing durable.
      const smaller = Math.max(512, size - 512 * (1 + (step.seed % 100)));
      return smaller < size ? { do: 'shrink', size: smaller } : undefined;
    }
  }
}

/** Bytes that are those of no other seed: a foreign cluster shows. Never 0. */
function pattern(length: number, seed: number): Uint8Array {
  let state = seed;
  return new Uint8Array(length).map(() => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return 1 + ((state >>> 16) % 255);
  });
}

/** @throws what the engine throws */
export async function perform({ image, list }: Session, action: Action): Promise<void> {
  const entry = (name: string): SnapshotEntry => list.entries.find((one) => one.name === name) as SnapshotEntry;
  const progress = (): void => {};
  switch (action.do) {
    case 'write':
      expect(writeRange(image, action.bytes, 0, action.bytes.length, action.at)).toBe(true);
      return;
    case 'discard':
    case 'zero':
      expect(zeroRange(image, action.at, action.length, action.do === 'discard' ? 'free' : 'keep')).toBe(true);
      return;
    case 'flush':
      flushIfRoom(image);
      return;
    case 'take':
      await takeSnapshot(image, list, { name: action.name, timeMs: 0 }, progress);
      return;
    case 'delete':
      return deleteSnapshot(image, list, entry(action.name), progress);
    case 'rename':
      await renameSnapshot(image, list, entry(action.name), action.to);
      return;
    case 'rollback':
      return applySnapshot(image, entry(action.name), progress);
    case 'compact':
      await compactImage(image, list, { progress });
      return;
    case 'grow':
      return growDisk(image, action.size);
    case 'shrink':
      await shrinkDisk(image, action.size);
      return;
  }
}

/** What the disk may hold when the action has returned. */
export function after(state: State, action: Action): State {
  const live = liveOf(state);
  const changed = live.slice();
  const snapshots = new Map(state.snapshots);
  switch (action.do) {
    case 'write':
      changed.set(action.bytes, action.at);
      return { versions: [...state.versions, changed], snapshots };
    case 'discard':
    case 'zero':
      changed.fill(0, action.at, action.at + action.length);
      return { versions: [...state.versions, changed], snapshots };
    case 'flush':
    case 'compact':
      return { versions: [live], snapshots };
    case 'take':
      snapshots.set(action.name, live);
      return { versions: [live], snapshots };
    case 'delete':
      snapshots.delete(action.name);
      return { versions: [live], snapshots };
    case 'rename': {
      // In the order of the table, in which the renamed one stays where it was.
      const renamed = [...state.snapshots].map(([name, bytes]): [string, Uint8Array] => [
        name === action.name ? action.to : name,
        bytes,
      ]);
      return { versions: [live], snapshots: new Map(renamed) };
    }
    case 'rollback':
      return { versions: [state.snapshots.get(action.name) as Uint8Array], snapshots };
    case 'grow':
    case 'shrink': {
      const resized = new Uint8Array(action.size);
      resized.set(live.subarray(0, action.size));
      return { versions: [resized], snapshots };
    }
  }
}

/** What the disk may hold when the action was interrupted: one of these. */
export function during(state: State, action: Action): readonly State[] {
  const done = after(state, action);
  switch (action.do) {
    case 'write':
    case 'discard':
    case 'zero':
      return [done];
    case 'shrink': {
      // What goes away is discarded first.
      const discarded = liveOf(state).slice();
      discarded.fill(0, action.size);
      return [{ versions: [...state.versions, discarded], snapshots: state.snapshots }, done];
    }
    default:
      return [state, done];
  }
}

/** What the open disk shows: live contents, and each snapshot. */
export function contentsOf({ image, list }: Session): State {
  const live = new Uint8Array(image.virtualSize());
  readRange(image, undefined, live, 0, live.length, 0);
  const snapshots = new Map<string, Uint8Array>();
  for (const entry of list.entries) {
    const bytes = new Uint8Array(entry.virtualSize);
    readRange(image, readSnapshotL1(image, entry), bytes, 0, bytes.length, 0);
    snapshots.set(entry.name, bytes);
  }
  return { versions: [live], snapshots };
}

/** In words what is not as it may be; undefined if all is well. */
export function difference(found: State, allowed: State): string | undefined {
  const live = liveOf(found);
  const size = liveOf(allowed).length;
  if (live.length !== size) return `the disk has ${live.length} bytes, not ${size}`;
  const names = [...found.snapshots.keys()].join();
  const expectedNames = [...allowed.snapshots.keys()].join();
  if (names !== expectedNames) return `the snapshots are ${names || 'none'}, not ${expectedNames || 'none'}`;
  for (const [name, bytes] of found.snapshots) {
    const wrong = firstWrong(bytes, [allowed.snapshots.get(name) as Uint8Array]);
    if (wrong >= 0) return `snapshot ${name}: byte ${wrong} of ${bytes.length} is ${bytes[wrong]}`;
  }
  const wrong = firstWrong(live, allowed.versions);
  if (wrong < 0) return undefined;
  return `byte ${wrong} of ${size} is ${live[wrong]}, none of ${allowed.versions.map((version) => version[wrong]).join()}`;
}

function firstWrong(bytes: Uint8Array, versions: readonly Uint8Array[]): number {
  if (versions.some((version) => version.length !== bytes.length)) return 0;
  if (versions.some((version) => Buffer.compare(version, bytes) === 0)) return -1;
  return bytes.findIndex((byte, index) => !versions.some((version) => version[index] === byte));
}
