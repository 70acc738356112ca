/** Random scripts against a model: writes, checkpoints of both kinds, deletes, renames, roll backs, remounts. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { propertyRuns, soakFactor } from '../property-runs.ts';
import { bytesOf, digest, OverlayDisk, qemuCheck, qemuDigest } from './overlay-disk.ts';

const BYTES = 256 * 1024;
const NAMES = ['a', 'b', 'c', 'd'];

const step = fc.oneof(
  {
    weight: 4,
    arbitrary: fc.record({
      do: fc.constant('write' as const),
      at: fc.nat(BYTES - 1),
      bytes: fc.integer({ min: 1, max: 40000 }),
      fill: fc.nat(255),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      do: fc.constant('discard' as const),
      at: fc.nat(BYTES - 1),
      bytes: fc.integer({ min: 1, max: 100000 }),
    }),
  },
  {
    weight: 4,
    arbitrary: fc.record({
      do: fc.constant('take' as const),
      kind: fc.constantFrom('external' as const, 'external' as const, 'internal' as const),
      name: fc.constantFrom(...NAMES),
    }),
  },
  { weight: 3, arbitrary: fc.record({ do: fc.constant('delete' as const), pick: fc.nat(20), discard: fc.boolean() }) },
  {
    weight: 1,
    arbitrary: fc.record({
      do: fc.constant('rename' as const),
      pick: fc.nat(20),
      name: fc.constantFrom(...NAMES, 'e'),
    }),
  },
  { weight: 2, arbitrary: fc.record({ do: fc.constant('rollback' as const), pick: fc.nat(20) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('remount' as const), by: fc.nat(20) }) },
);
type Step = typeof step extends fc.Arbitrary<infer T> ? T : never;

/** What may be refused, and changes nothing then. */
const REFUSALS = new Set(['EEXIST', 'EBUSY', 'ENOTSUP']);

class Run {
  readonly #test: OverlayDisk;
  #live = Buffer.alloc(BYTES);
  /** By kind and name. */
  #points = new Map<string, Buffer>();

  constructor(test: OverlayDisk) {
    this.#test = test;
  }

  async step(one: Step): Promise<void> {
    const test = this.#test;
    const all = test.disk.checkpoints();
    const picked = 'pick' in one ? all[one.pick % Math.max(1, all.length)] : undefined;
    if ('pick' in one && picked === undefined) return;
    const key = picked === undefined ? '' : `${picked.kind} ${picked.name}`;
    try {
      switch (one.do) {
        case 'write': {
          const length = Math.min(one.bytes, BYTES - one.at);
          test.write(one.fill, one.at, length);
          this.#live.fill(one.fill, one.at, one.at + length);
          break;
        }
        case 'discard': {
          const length = Math.min(one.bytes, BYTES - one.at);
          using live = test.disk.openLive();
          live.contents.discard(one.at, length);
          this.#live.fill(0, one.at, one.at + length);
          break;
        }
        case 'take':
          await test.disk.takeCheckpoint(one.name, { kind: one.kind });
          this.#points.set(`${one.kind} ${one.name}`, Buffer.from(this.#live));
          break;
        case 'delete': {
          const discard = one.discard && picked?.kind === 'external';
          await test.disk.deleteCheckpoint(picked as never, { discard });
          if (discard) this.#discarded(this.#points.get(key) as Buffer);
          this.#points.delete(key);
          break;
        }
        case 'rename': {
          const renamed = await test.disk.renameCheckpoint(picked as never, one.name);
          const contents = this.#points.get(key) as Buffer;
          this.#points.delete(key);
          this.#points.set(`${renamed.kind} ${renamed.name}`, contents);
          break;
        }
        case 'rollback': {
          const before = Buffer.from(this.#live);
          await test.disk.rollback(picked as never);
          this.#live = Buffer.from(this.#points.get(key) as Buffer);
          this.#learn(before);
          break;
        }
        case 'remount': {
          const files = test.files.filter((name) => name.endsWith('.qcow2'));
          await test.open(test.at(files[one.by % files.length] as string));
          break;
        }
      }
    } catch (error) {
      if (!(error instanceof FsError) || !REFUSALS.has(error.errno)) throw error;
    }
    this.#check();
  }

  /** The checkpoint that a roll back makes of what the disk held. */
  #learn(before: Buffer): void {
    for (const { kind, name } of this.#test.disk.checkpoints()) {
      const key = `${kind} ${name}`;
      // Internal ones of a branch come back when the disk does; what they hold was forgotten.
      if (kind === 'external' && !this.#points.has(key)) this.#points.set(key, before);
    }
    this.#forget();
  }

  #discarded(shown: Buffer): void {
    this.#live = Buffer.from(shown);
    this.#forget();
  }

  /** Those that went along: internal ones of layers that the chain has left, external ones above what was discarded. */
  #forget(): void {
    const there = new Set(this.#test.disk.checkpoints().map(({ kind, name }) => `${kind} ${name}`));
    for (const key of this.#points.keys()) if (!there.has(key)) this.#points.delete(key);
  }

  #check(): void {
    const test = this.#test;
    expect(test.live()).toBe(digest(this.#live));
    const found = test.disk.checkpoints();
    for (const checkpoint of found) {
      const expected = this.#points.get(`${checkpoint.kind} ${checkpoint.name}`);
      // Internal ones of a branch come back when the disk does.
      if (expected === undefined && checkpoint.kind === 'internal') continue;
      expect(expected, `${checkpoint.kind} ${checkpoint.name} is not known`).toBeDefined();
      using open = test.disk.openCheckpoint(checkpoint);
      expect(digest(bytesOf(open.contents)), `${checkpoint.kind} ${checkpoint.name}`).toBe(digest(expected as Buffer));
    }
    const external = [...this.#points.keys()].filter((key) => key.startsWith('external'));
    expect(
      found
        .filter(({ kind }) => kind === 'external')
        .map(({ name }) => `external ${name}`)
        .sort(),
    ).toEqual(external.sort());
  }

  /** QEMU reads the same, and finds nothing wrong. */
  async finish(): Promise<void> {
    const test = this.#test;
    const top = test.at(test.chain[0] as string);
    await test.close();
    expect(qemuDigest(top)).toBe(digest(this.#live));
    for (const file of test.files) if (file.endsWith('.qcow2')) qemuCheck(test.at(file));
  }
}

describe('overlays', () => {
  it('do what the model does, whatever is done to them', async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 10, maxLength: 30 }), async (steps) => {
        await using test = new OverlayDisk(BYTES);
        await test.open();
        const run = new Run(test);
        for (const one of steps) await run.step(one);
        await run.finish();
      }),
      { numRuns: propertyRuns(12), endOnFailure: false, interruptAfterTimeLimit: 20_000 * soakFactor },
    );
  });
});
