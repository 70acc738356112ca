/** Differences from the tables against the bytes: all that differs is told, and nothing that shares its place. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type Difference, differences, type Moment } from '../../src/qcow2/difference.ts';
import { imageLayer } from '../../src/qcow2/own-extents.ts';
import { readSnapshotL1 } from '../../src/qcow2/snapshots.ts';
import { atOnce } from '../../src/qcow2/steps.ts';
import { propertyRuns } from '../property-runs.ts';
import { buildChain, change, changes, type File, type LayerFormat, openChain, readAll } from './chains.ts';
import { closeSession, openSession } from './model.ts';
import { perform } from './script.ts';

const formats: [string, LayerFormat, LayerFormat][] = [
  ['512-byte clusters over a raw file', { raw: 40_000 }, { size: 50_176, clusterBytes: 512 }],
  ['4 KiB clusters over larger ones', { size: 200_192, clusterBytes: 65536 }, { size: 120_320, clusterBytes: 4096 }],
  [
    'subclusters over version 2',
    { size: 90_112, clusterBytes: 1024, version: 2 },
    { size: 200_192, clusterBytes: 16384, extendedL2: true },
  ],
];

/** The moments of a chain of two files: each file's live contents, and those of three snapshots in the upper one. */
async function moments(
  files: File[],
  later: Parameters<typeof change>[2][][],
): Promise<{ moment: Moment; bytes: Uint8Array }[]> {
  const [lower, upper] = files as [File, File];
  const bottom = openChain([lower])[0]!;
  const session = openSession(upper.storage, upper.storage, bottom.backing);
  const { image, list } = session;
  const content = readAll(image);
  const taken: Uint8Array[] = [];
  for (const [index, list] of later.entries()) {
    await perform(session, { do: 'take', name: `s${index}` });
    taken.push(content.slice());
    for (const one of list) change(image, content, one);
  }
  await perform(session, { do: 'grow', size: content.length + 5120 });
  const below = { layer: bottom.layer, file: lower };
  const live = { moment: [{ layer: imageLayer(image), file: upper }, below], bytes: readAll(image) };
  const snapshots = list.entries.map((entry, index) => ({
    moment: [{ layer: imageLayer(image, readSnapshotL1(image, entry), entry.virtualSize), file: upper }, below],
    bytes: taken[index] as Uint8Array,
  }));
  return [{ moment: [below], bytes: lower.content }, ...snapshots, live];
}

function expectAllTold(a: Uint8Array, b: Uint8Array, found: readonly Difference[]): void {
  const size = Math.max(a.length, b.length);
  let position = 0;
  for (const { offset, length, kind } of [...found, { offset: size, length: 0, kind: 'zero' as const }]) {
    expect(offset).toBeGreaterThanOrEqual(position);
    for (let at = position; at < offset; at++) if ((a[at] ?? 0) !== (b[at] ?? 0)) throw new Error(`byte ${at} differs`);
    if (kind === 'zero') expect(b.subarray(offset, offset + length).every((byte) => byte === 0)).toBe(true);
    position = offset + length;
  }
  expect(position).toBe(size);
}

describe('every byte that differs is in a difference', () => {
  it.each(formats)('%s', async (_name, lower, upper) => {
    await fc.assert(
      fc.asyncProperty(
        changes(4),
        changes(4),
        fc.array(changes(3), { minLength: 3, maxLength: 3 }),
        async (x, y, z) => {
          const all = await moments(
            buildChain([
              { format: lower, changes: x },
              { format: upper, changes: y },
            ]),
            z,
          );
          for (const from of all)
            for (const to of all) {
              const found = atOnce(differences(from.moment, to.moment));
              if (from === to) expect(found).toEqual([]);
              expectAllTold(from.bytes, to.bytes, found);
            }
        },
      ),
      { numRuns: propertyRuns(15) },
    );
  });
});

it('what was not touched between two snapshots is no difference', async () => {
  const [file] = buildChain([{ format: { size: 2 ** 20, clusterBytes: 4096 }, changes: [] }]) as [File];
  const session = openSession(file.storage);
  const { image, list } = session;
  const bytes = new Uint8Array(20_000).fill(7);
  await perform(session, { do: 'write', at: 0, bytes });
  await perform(session, { do: 'take', name: 'a' });
  await perform(session, { do: 'write', at: 8192, bytes: bytes.subarray(0, 100) });
  await perform(session, { do: 'discard', at: 4096, length: 4096 });
  await perform(session, { do: 'take', name: 'b' });
  await perform(session, { do: 'write', at: 500_000, bytes: bytes.subarray(0, 8192) });
  const moment = (index: number): Moment => {
    const entry = list.entries[index]!;
    return [{ layer: imageLayer(image, readSnapshotL1(image, entry), entry.virtualSize), file }];
  };
  const live: Moment = [{ layer: imageLayer(image), file }];
  expect(atOnce(differences(moment(0), moment(1)))).toEqual([
    { offset: 4096, length: 4096, kind: 'zero' },
    { offset: 8192, length: 4096, kind: 'data' },
  ]);
  expect(atOnce(differences(moment(1), live))).toEqual([{ offset: 499_712, length: 12_288, kind: 'data' }]);
  expect(atOnce(differences(live, moment(1)))).toEqual([{ offset: 499_712, length: 12_288, kind: 'zero' }]);
  closeSession(session);
});
