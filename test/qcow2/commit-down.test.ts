import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { checkImage } from '../../src/qcow2/check.ts';
import { commitAll, commitWritten, finishCommit, prepareCommit } from '../../src/qcow2/commit-down.ts';
import { type CommitTarget, imageTarget, rawTarget } from '../../src/qcow2/commit-target.ts';
import { flush } from '../../src/qcow2/flush.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import type { Image } from '../../src/qcow2/image.ts';
import { commitCost } from '../../src/qcow2/move-cost.ts';
import { imageLayer, joinZeros, ownExtents } from '../../src/qcow2/own-extents.ts';
import { atOnce, inSteps } from '../../src/qcow2/steps.ts';
import { trackWrites, writtenBytes } from '../../src/qcow2/written-map.ts';
import { propertyRuns } from '../property-runs.ts';
import { crashImages, Recorder } from '../storage/recorder.ts';
import {
  buildChain,
  type Change,
  chainFormats,
  change,
  changes,
  closeChain,
  expectContent,
  type File,
  type Opened,
  openChain,
} from './chains.ts';
import { qemuCheck, recover } from './model.ts';

const targetOf = ({ image, storage }: Opened): CommitTarget =>
  image === undefined ? rawTarget(storage) : imageTarget(image);

/** What the lower one holds afterwards: its own bytes behind the upper one's end. */
function committed(upper: File, lower: File): Uint8Array {
  const content = new Uint8Array(Math.max(upper.content.length, lower.content.length));
  content.set(lower.content);
  content.set(upper.content);
  return content;
}

function expectLower(files: readonly File[], content: Uint8Array): void {
  const lower = files.at(-1) as File;
  if ('raw' in lower.format) {
    expect(Buffer.compare(lower.storage.bytes(), content)).toBe(0);
    return;
  }
  qemuCheck(lower.storage);
  const opened = openChain(files);
  expectContent(opened.at(-1)?.image as Image, content, 'the lower image alone');
}

const hostBytes = (storage: { size(): number }): number => storage.size();

describe('commit', () => {
  it.each(chainFormats)(
    'moves what an image has into the one below, which reads the same at each step: $name',
    async ({ formats }) => {
      await fc.assert(
        fc.asyncProperty(fc.tuple(...formats.map(() => changes(8))), async (scripts) => {
          const files = buildChain(formats.map((format, index) => ({ format, changes: scripts[index] as Change[] })));
          const [lower, upper] = files.slice(-2) as [File, File];
          const opened = openChain(files);
          const [below, above] = opened.slice(-2) as [Opened, Opened];
          const image = above.image as Image;
          const target = targetOf(below);
          const cost = atOnce(commitCost(image, below.image ?? { raw: below.layer }));
          const bytesBefore = hostBytes(lower.storage);
          await prepareCommit(image, target);
          for (const _ of commitAll(image, target)) expectContent(image, upper.content, 'in the middle');
          await finishCommit(image, target, { shrink: false });
          expectContent(image, upper.content, 'with the upper image');
          // Clusters that were replaced are free again in the end, but were not when others were needed.
          if (below.image !== undefined && cost.moved > 0) {
            const grown = Math.max(0, lower.storage.size() - bytesBefore);
            const l1Bytes = 2 * below.image.geometry.clusterBytes;
            expect(grown).toBeLessThanOrEqual(cost.allocated * 2 + l1Bytes);
          }
          closeChain(opened);
          expectLower(files.slice(0, -1), committed(upper, lower));
        }),
        { numRuns: propertyRuns(20) },
      );
    },
  );

  it('says zeros of small clusters as such in a large one, which then needs no data', async () => {
    const KIB = 1024;
    const all = { at: 0, length: 1, byte: 7 };
    const files = buildChain([
      { format: { raw: 512 * KIB }, changes: [{ ...all, do: 'write' }] },
      { format: { size: 512 * KIB, clusterBytes: 64 * KIB }, changes: [] },
      { format: { size: 512 * KIB, clusterBytes: 512 }, changes: [{ ...all, do: 'zero' }] },
    ]);
    const opened = openChain(files);
    const [lower, upper] = opened.slice(-2).map(({ image }) => image) as [Image, Image];
    // No more than the L2 table, and a refcount block, as there might be none for it.
    expect(atOnce(commitCost(upper, lower))).toEqual({ moved: 0, allocated: 2 * 64 * KIB });
    const target = imageTarget(lower);
    await prepareCommit(upper, target);
    atOnce(commitAll(upper, target));
    await finishCommit(upper, target, { shrink: false });
    expect([...joinZeros(ownExtents(imageLayer(lower), 0, 512 * KIB))]).toEqual([
      { offset: 0, length: 512 * KIB, kind: 'zero', host: 0, hostBytes: 0 },
    ]);
    closeChain(opened);
    expectLower(files.slice(0, -1), (files.at(-1) as File).content);
  });

  it.each(chainFormats)('in rounds, while the upper image is written: $name', async ({ formats }) => {
    await fc.assert(
      fc.asyncProperty(
        fc.tuple(...formats.map(() => changes(5))),
        fc.array(fc.record({ change: changes(1), steps: fc.integer({ min: 0, max: 3 }) }), { maxLength: 12 }),
        async (scripts, later) => {
          const files = buildChain(formats.map((format, index) => ({ format, changes: scripts[index] as Change[] })));
          const upper = files.at(-1) as File;
          const opened = openChain(files);
          const [below, above] = opened.slice(-2) as [Opened, Opened];
          const image = above.image as Image;
          const target = targetOf(below);
          await prepareCommit(image, target);
          trackWrites(image);
          let steps = commitAll(image, target);
          for (const { change: some, steps: count } of later) {
            for (const one of some) change(image, upper.content, one);
            for (let step = 0; step < count; step++) if (steps.next().done) steps = commitWritten(image, target);
            expectContent(image, upper.content, 'in the middle');
          }
          atOnce(steps);
          atOnce(commitWritten(image, target));
          expect(writtenBytes(image)).toBe(0);
          await finishCommit(image, target, { shrink: true });
          expectContent(image, upper.content, 'with the upper image');
          closeChain(opened);
          expectLower(files.slice(0, -1), upper.content);
        },
      ),
      { numRuns: propertyRuns(20) },
    );
  });

  const crashing = chainFormats.filter(({ name }) =>
    /equal|raw lower|subclusters over|version 2, which|longer/.test(name),
  );

  it.each(crashing)('a crash leaves a lower image over which the upper reads the same: $name', async ({ formats }) => {
    await fc.assert(
      fc.asyncProperty(fc.tuple(...formats.map(() => changes(5))), async (scripts) => {
        const files = buildChain(formats.map((format, index) => ({ format, changes: scripts[index] as Change[] })));
        const [lower, upper] = files.slice(-2) as [File, File];
        const before = lower.storage.copy();
        const recorder = new Recorder(lower.storage);
        const opened = openChain([...files.slice(0, -2), { ...lower, storage: recorder }, upper]);
        const [below, above] = opened.slice(-2) as [Opened, Opened];
        const image = above.image as Image;
        await prepareCommit(image, targetOf(below));
        let step = 0;
        for (const _ of commitAll(image, targetOf(below))) if (++step % 5 === 0) targetOf(below).flush();
        await finishCommit(image, targetOf(below), { shrink: true });
        recorder.mark('committed');
        closeChain(opened);

        let index = 0;
        const all = [...crashImages(before, recorder.operations, { samples: 1, exhaustive: 2 })];
        const every = Math.max(1, Math.floor(all.length / 25));
        for (const { file, label, marks } of all) {
          if (index++ % every !== 0 && marks.length === 0) continue;
          if (!('raw' in lower.format)) {
            recover(file);
            expect(await checkImage(file.copy(), readHeader(file)), label).toMatchObject({ corruptions: 0, leaks: 0 });
          }
          const again = openChain([...files.slice(0, -2), { ...lower, storage: file }, upper]);
          expectContent(again.at(-1)?.image as Image, upper.content, label);
          if (marks.includes('committed')) {
            const alone = again.at(-2) as Opened;
            if (alone.image !== undefined) expectContent(alone.image, upper.content, `${label}: alone`);
          } else if (index % 3 === 0) {
            // Done again from the start.
            const target = targetOf(again.at(-2) as Opened);
            await prepareCommit(again.at(-1)?.image as Image, target);
            atOnce(commitAll(again.at(-1)?.image as Image, target));
            const alone = again.at(-2) as Opened;
            if (alone.image !== undefined) {
              const content = committed(upper, lower).subarray(0, alone.image.virtualSize());
              expectContent(alone.image, content, `${label}: again`);
            }
          }
        }
      }),
      { numRuns: propertyRuns(5), endOnFailure: true },
    );
  });

  it('can be broken off by a full disk at any change, and done again', async () => {
    const formats = chainFormats[0]!.formats;
    const script: Change[] = [
      { do: 'write', at: 0.1, length: 0.7, byte: 7 },
      { do: 'zero', at: 0.4, length: 0.5, byte: 0 },
      { do: 'write', at: 0.9, length: 0.9, byte: 9 },
    ];
    for (let at = 0; ; at++) {
      const files = buildChain(
        formats.map((format, index) => ({
          format,
          changes: script.map((one) => ({ ...one, byte: one.byte + index })),
        })),
      );
      const [lower, upper] = files.slice(-2) as [File, File];
      const recorder = new Recorder(lower.storage);
      const opened = openChain([...files.slice(0, -2), { ...lower, storage: recorder }, upper]);
      const image = opened.at(-1)?.image as Image;
      const target = targetOf(opened.at(-2) as Opened);
      recorder.fail({ at, how: 'ENOSPC', times: Number.POSITIVE_INFINITY });
      let failed = false;
      try {
        await prepareCommit(image, target);
        await inSteps(commitAll(image, target));
        await finishCommit(image, target, { shrink: false });
      } catch (error) {
        expect((error as { errno?: string }).errno).toMatch(/ENOSPC|EIO/);
        failed = true;
      }
      recorder.fail(undefined);
      expectContent(image, upper.content, `change ${at} failed`);
      if (!failed) break;
      recover(lower.storage);
      const again = openChain(files);
      const above = again.at(-1)?.image as Image;
      expectContent(above, upper.content, `change ${at} failed, opened again`);
      const second = targetOf(again.at(-2) as Opened);
      await prepareCommit(above, second);
      await inSteps(commitAll(above, second));
      await finishCommit(above, second, { shrink: false });
      flush(above);
      closeChain(again);
      expectLower(files.slice(0, -1), upper.content);
    }
  });

  it.each([
    ['a raw file', { raw: 32_768 }],
    ['an image', { size: 32_768, clusterBytes: 4096 }],
  ])('what is discarded behind the end of %s after it was committed reads as zeros below', async (_name, format) => {
    const files = buildChain([
      { format, changes: [] },
      { format: { size: 131_072, clusterBytes: 4096 }, changes: [{ do: 'write', at: 0.5, length: 1, byte: 5 }] },
    ]);
    const upper = files.at(-1) as File;
    const opened = openChain(files);
    const image = opened.at(-1)?.image as Image;
    const target = targetOf(opened[0] as Opened);
    await prepareCommit(image, target);
    trackWrites(image);
    atOnce(commitAll(image, target));
    change(image, upper.content, { do: 'discard', at: 0.6, length: 1, byte: 0 });
    atOnce(commitWritten(image, target));
    await finishCommit(image, target, { shrink: false });
    expectContent(image, upper.content, 'with the upper image');
    closeChain(opened);
    expectLower(files.slice(0, -1), upper.content);
  });

  it('is aborted by a signal', async () => {
    const files = buildChain(
      chainFormats[0]!.formats.map((format) => ({ format, changes: [{ do: 'write', at: 0, length: 1, byte: 5 }] })),
    );
    const opened = openChain(files);
    const image = opened.at(-1)?.image as Image;
    const abort = new AbortController();
    abort.abort(new Error('enough'));
    await expect(
      inSteps(commitAll(image, targetOf(opened.at(-2) as Opened)), { signal: abort.signal }),
    ).rejects.toThrow('enough');
  });
});
