import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { FormatOptions } from '../../src/qcow2/create.ts';
import { zeroRange } from '../../src/qcow2/discard.ts';
import { flush } from '../../src/qcow2/flush.ts';
import { readRange } from '../../src/qcow2/read.ts';
import { growDisk, shrinkDisk } from '../../src/qcow2/resize.ts';
import { applySnapshot, deleteSnapshot, readSnapshotL1, renameSnapshot } from '../../src/qcow2/snapshots.ts';
import { takeSnapshot } from '../../src/qcow2/take-snapshot.ts';
import { writeRange } from '../../src/qcow2/write.ts';
import { propertyRuns } from '../property-runs.ts';
import { MemoryStorage } from '../storage/memory-storage.ts';
import { closeSession, formatted, openSession, patternBacking, qemuCheck, type Session } from './model.ts';

type Step =
  | { do: 'write'; at: number; length: number; byte: number }
  | { do: 'discard' | 'zero'; at: number; length: number }
  | { do: 'flush' | 'reopen' | 'take' | 'delete' | 'rename' | 'rollback'; which: number }
  | { do: 'grow' | 'shrink'; by: number };

const fraction = fc.double({ min: 0, max: 1, noNaN: true });

const steps = fc.array(
  fc.oneof(
    {
      weight: 10,
      arbitrary: fc.record({
        do: fc.constant('write' as const),
        at: fraction,
        length: fraction,
        byte: fc.integer({ min: 1, max: 255 }),
      }),
    },
    {
      weight: 4,
      arbitrary: fc.record({
        do: fc.constantFrom('discard' as const, 'zero' as const),
        at: fraction,
        length: fraction,
      }),
    },
    {
      weight: 5,
      arbitrary: fc.record({
        do: fc.constantFrom('flush', 'reopen', 'take', 'take', 'delete', 'rename', 'rollback'),
        which: fc.nat(),
      }),
    },
    {
      weight: 1,
      arbitrary: fc.record({ do: fc.constantFrom('grow', 'shrink'), by: fc.integer({ min: 1, max: 200 }) }),
    },
  ) as fc.Arbitrary<Step>,
  { minLength: 5, maxLength: 40 },
);

/** Run the script on engine and model, comparing every byte of the disk and of all snapshots at the end of each step. */
async function run(options: FormatOptions, script: readonly Step[], backingBytes = 0, external = false): Promise<void> {
  const storage = formatted(options);
  const data = external ? new MemoryStorage() : storage;
  if (external) data.truncate(options.size);
  const backing = backingBytes > 0 ? patternBacking(backingBytes) : undefined;
  let session: Session = openSession(storage, data, backing);
  let live = new Uint8Array(options.size);
  if (backing !== undefined) live.set(backing.content.subarray(0, options.size));
  const saved = new Map<string, Uint8Array>();
  let counter = 0;

  const compare = (): void => {
    const { image, list } = session;
    expect(image.virtualSize()).toBe(live.length);
    const got = new Uint8Array(live.length);
    readRange(image, undefined, got, 0, got.length, 0);
    expect(Buffer.compare(got, live)).toBe(0);
    for (const entry of list.entries) {
      const expected = saved.get(entry.name) as Uint8Array;
      const snapshot = new Uint8Array(entry.virtualSize);
      expect(snapshot.length).toBe(expected.length);
      readRange(image, readSnapshotL1(image, entry), snapshot, 0, snapshot.length, 0);
      expect(Buffer.compare(snapshot, expected)).toBe(0);
    }
  };

  for (const step of script) {
    const { image, list } = session;
    const entry = 'which' in step ? list.entries[step.which % Math.max(1, list.entries.length)] : undefined;
    switch (step.do) {
      case 'write': {
        const at = Math.floor(step.at * (live.length - 1));
        const length = Math.max(1, Math.floor(step.length ** 3 * (live.length - at)));
        const bytes = new Uint8Array(length).map((_, index) => (step.byte + index) & 0xff);
        expect(writeRange(image, bytes, 0, length, at)).toBe(true);
        live.set(bytes, at);
        break;
      }
      case 'discard':
      case 'zero': {
        const at = Math.floor(step.at * (live.length - 1));
        const length = Math.max(1, Math.floor(step.length * (live.length - at)));
        expect(zeroRange(image, at, length, step.do === 'discard' ? 'free' : 'keep')).toBe(true);
        live.fill(0, at, at + length);
        break;
      }
      case 'flush':
        flush(image);
        break;
      case 'reopen':
        closeSession(session);
        qemuCheck(storage);
        session = openSession(storage, data, backing);
        break;
      case 'take': {
        if (external || list.entries.length > 4) break;
        const name = `s${counter++}`;
        await takeSnapshot(image, list, { name, timeMs: 0 }, () => {});
        saved.set(name, live.slice());
        break;
      }
      case 'delete':
        if (entry !== undefined) await deleteSnapshot(image, list, entry, () => {});
        break;
      case 'rename':
        if (entry !== undefined) {
          const renamed = await renameSnapshot(image, list, entry, `r${counter++}`);
          saved.set(renamed.name, saved.get(entry.name) as Uint8Array);
        }
        break;
      case 'rollback':
        if (entry !== undefined) {
          await applySnapshot(image, entry, () => {});
          live = (saved.get(entry.name) as Uint8Array).slice();
        }
        break;
      case 'grow': {
        const size = live.length + step.by * 512;
        await growDisk(image, size);
        const grown = new Uint8Array(size);
        grown.set(live);
        live = grown;
        break;
      }
      case 'shrink': {
        const size = Math.max(512, live.length - step.by * 512);
        if (size === live.length) break;
        await shrinkDisk(image, size);
        live = live.slice(0, size);
        break;
      }
    }
    compare();
  }
  closeSession(session);
  qemuCheck(storage);
}

const variants: [string, FormatOptions, number][] = [
  ['512-byte clusters', { size: 100_352, clusterBytes: 512 }, 0],
  [
    '4 KiB clusters over a backing file',
    { size: 300_032, clusterBytes: 4096, backing: { file: 'b', format: 'raw' } },
    200_000,
  ],
  [
    'version 2 over a longer backing file',
    { size: 200_192, version: 2, clusterBytes: 1024, backing: { file: 'b', format: 'raw' } },
    250_000,
  ],
  ['64 KiB clusters, 2-bit refcounts', { size: 700_416, refcountBits: 2 }, 0],
  ['64-bit refcounts', { size: 150_016, clusterBytes: 512, refcountBits: 64 }, 0],
  ['subclusters', { size: 600_064, clusterBytes: 16384, extendedL2: true }, 0],
  [
    'subclusters over a backing file',
    { size: 600_064, clusterBytes: 16384, extendedL2: true, backing: { file: 'b', format: 'raw' } },
    400_000,
  ],
  ['preallocated metadata', { size: 300_032, clusterBytes: 4096, preallocation: 'metadata' }, 0],
];

describe('the engine agrees with a plain array, and qemu-img check finds nothing', () => {
  it.each(variants)('%s', async (_name, options, backing) => {
    await fc.assert(
      fc.asyncProperty(steps, (script) =>
        run(options, script, backing).catch((error: unknown) => {
          // A 2-bit refcount holds three references: then the snapshot is refused, which ends this script.
          if (options.refcountBits === 2 && (error as { errno?: string }).errno === 'ENOTSUP') return;
          throw error;
        }),
      ),
      { numRuns: propertyRuns(25) },
    );
  });

  it.each<[string, FormatOptions]>([
    ['external data file', { size: 300_032, clusterBytes: 4096, dataFile: { file: 'd' } }],
    [
      'external data file with subclusters',
      { size: 600_064, clusterBytes: 16384, extendedL2: true, dataFile: { file: 'd' } },
    ],
    ['raw external data file', { size: 300_032, clusterBytes: 4096, dataFile: { file: 'd', raw: true } }],
  ])('%s', async (_name, options) => {
    await fc.assert(
      fc.asyncProperty(steps, (script) => run(options, script, 0, true)),
      { numRuns: propertyRuns(20) },
    );
  });
});
