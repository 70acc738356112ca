import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { Storage } from '../../src/storage/storage.ts';
import { propertyRuns } from '../property-runs.ts';

/** Holes are looked for in units that every file system has. */
const UNIT = 65_536;

type Step =
  | { readonly do: 'write'; readonly position: number; readonly length: number; readonly value: number }
  | { readonly do: 'truncate'; readonly size: number }
  | { readonly do: 'punch'; readonly position: number; readonly length: number };

const position = fc.nat(5 * UNIT);
const length = fc.nat(2 * UNIT);
const step: fc.Arbitrary<Step> = fc.oneof(
  fc.record({ do: fc.constant('write' as const), position, length, value: fc.integer({ min: 1, max: 255 }) }),
  fc.record({ do: fc.constant('truncate' as const), size: position }),
  fc.record({ do: fc.constant('punch' as const), position, length }),
);

/** What `steps` leave behind, by a plain array. */
function model(steps: readonly Step[]): Uint8Array {
  let bytes = new Uint8Array(0);
  const resize = (size: number): void => {
    const old = bytes;
    bytes = new Uint8Array(size);
    bytes.set(old.subarray(0, size));
  };
  for (const one of steps) {
    if (one.do === 'truncate') resize(one.size);
    else if (one.do === 'punch') bytes.fill(0, one.position, one.position + one.length);
    else if (one.length > 0) {
      if (one.position + one.length > bytes.length) resize(one.position + one.length);
      bytes.fill(one.value, one.position, one.position + one.length);
    }
  }
  return bytes;
}

function apply(storage: Storage, one: Step): void {
  if (one.do === 'truncate') storage.truncate(one.size);
  else if (one.do === 'punch') storage.punch(one.position, one.length);
  else storage.write(new Uint8Array(one.length + 2).fill(one.value), 1, one.length, one.position);
}

/** What every `Storage` does. `use` gives a fresh empty one, writable and able to punch, for the time of its action. */
export function storageContract(name: string, use: (action: (storage: Storage) => void) => void): void {
  describe(`the contract of Storage, kept by ${name}`, () => {
    it('writes at a position from the middle of an array, and reads it back into the middle of another', () =>
      use((storage) => {
        storage.write(Uint8Array.of(9, 1, 2, 3, 9), 1, 3, 1000);
        const target = new Uint8Array(6).fill(7);
        expect(storage.read(target, 2, 3, 1000)).toBe(3);
        expect([...target]).toEqual([7, 7, 1, 2, 3, 7]);
        expect(storage.size()).toBe(1003);
      }));

    it('reads fewer bytes only at the end of the file', () =>
      use((storage) => {
        storage.write(new Uint8Array(100).fill(5), 0, 100, 0);
        const target = new Uint8Array(64);
        expect(storage.read(target, 0, 64, 80)).toBe(20);
        expect(storage.read(target, 0, 64, 100)).toBe(0);
        expect(storage.read(target, 0, 64, 5000)).toBe(0);
        expect(storage.read(target, 0, 0, 0)).toBe(0);
      }));

    it('works on memory shared between threads', () =>
      use((storage) => {
        const shared = new Uint8Array(new SharedArrayBuffer(16));
        shared.set([1, 2, 3], 4);
        storage.write(shared, 4, 3, 0);
        expect(storage.read(shared, 8, 3, 0)).toBe(3);
        expect([...shared.subarray(8, 11)]).toEqual([1, 2, 3]);
      }));

    it('reaches positions above 2^32', () =>
      use((storage) => {
        const far = 2 ** 40 + 3;
        storage.write(Uint8Array.of(42), 0, 1, far);
        const target = new Uint8Array(1);
        expect(storage.read(target, 0, 1, far)).toBe(1);
        expect([target[0], storage.size()]).toEqual([42, far + 1]);
      }));

    it('shrinks and grows; what is new reads as zeros', () =>
      use((storage) => {
        storage.write(new Uint8Array(10).fill(1), 0, 10, 0);
        storage.truncate(5);
        storage.truncate(10);
        const target = new Uint8Array(10).fill(9);
        expect(storage.read(target, 0, 10, 0)).toBe(10);
        expect([...target]).toEqual([1, 1, 1, 1, 1, 0, 0, 0, 0, 0]);
        storage.flush();
      }));

    it('a punched range reads as zeros and takes no space; the size stays', () =>
      use((storage) => {
        storage.write(new Uint8Array(4 * UNIT).fill(1), 0, 4 * UNIT, 0);
        const before = storage.allocatedBytes();
        expect(storage.punch(2 * UNIT, UNIT)).toBe(true);
        expect(storage.size()).toBe(4 * UNIT);
        expect(before - storage.allocatedBytes()).toBe(UNIT);
        const target = new Uint8Array(3).fill(9);
        storage.read(target, 0, 3, 2 * UNIT - 1);
        expect([...target]).toEqual([1, 0, 0]);
      }));

    it('punching past the end does not grow the file', () =>
      use((storage) => {
        storage.write(new Uint8Array(4096).fill(1), 0, 4096, 0);
        expect(storage.punch(0, 2 * UNIT)).toBe(true);
        expect(storage.punch(0, 0)).toBe(true);
        expect(storage.size()).toBe(4096);
      }));

    it('data and holes are found in turn; -1 or the size follows the last', () =>
      use((storage) => {
        storage.truncate(8 * UNIT);
        storage.write(new Uint8Array(UNIT).fill(1), 0, UNIT, 2 * UNIT);
        storage.write(new Uint8Array(UNIT).fill(1), 0, UNIT, 5 * UNIT);
        expect([storage.nextData(0), storage.nextHole(0)]).toEqual([2 * UNIT, 0]);
        expect([storage.nextData(2 * UNIT + 7), storage.nextHole(2 * UNIT + 7)]).toEqual([2 * UNIT + 7, 3 * UNIT]);
        expect(storage.nextData(3 * UNIT)).toBe(5 * UNIT);
        expect([storage.nextData(6 * UNIT), storage.nextHole(7 * UNIT)]).toEqual([-1, 7 * UNIT]);
        expect([storage.nextData(8 * UNIT), storage.nextHole(8 * UNIT)]).toEqual([-1, 8 * UNIT]);
      }));

    it('a file without holes ends in one', () =>
      use((storage) => {
        storage.write(new Uint8Array(5000).fill(1), 0, 5000, 0);
        expect(storage.nextHole(0)).toBe(5000);
      }));

    it('holds what a plain array would hold, whatever is done to it', () =>
      fc.assert(
        fc.property(fc.array(step, { maxLength: 12 }), (steps) =>
          use((storage) => {
            for (const one of steps) apply(storage, one);
            const expected = model(steps);
            expect(storage.size()).toBe(expected.length);
            const found = new Uint8Array(expected.length).fill(9);
            expect(storage.read(found, 0, found.length, 0)).toBe(expected.length);
            expect(Buffer.compare(found, expected)).toBe(0);
            const firstByte = expected.findIndex((byte) => byte !== 0);
            if (firstByte >= 0) {
              const data = storage.nextData(0);
              expect(data).toBeGreaterThanOrEqual(0);
              expect(data).toBeLessThanOrEqual(firstByte);
            }
          }),
        ),
        { numRuns: propertyRuns(60) },
      ));
  });
}
