import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { checkImage } from '../../src/qcow2/check.ts';
import { flush } from '../../src/qcow2/flush.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import type { Backing, Image } from '../../src/qcow2/image.ts';
import { pullCost } from '../../src/qcow2/move-cost.ts';
import { imageLayer, ownExtents } from '../../src/qcow2/own-extents.ts';
import { preparePull, pullUp } from '../../src/qcow2/pull-up.ts';
import { atOnce, inSteps, type Steps } from '../../src/qcow2/steps.ts';
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
import { closeSession, openSession, qemuCheck, recover } from './model.ts';

interface Pulling {
  readonly files: readonly File[];
  readonly opened: readonly Opened[];
  readonly upper: File;
  readonly image: Image;
  readonly base: Backing | undefined;
  readonly steps: Steps<number>;
}

/** @param levels images that go away at most */
function pulling(files: readonly File[], levels: number, recorder?: Recorder): Pulling {
  const upper = files.at(-1) as File;
  const opened = openChain(recorder === undefined ? files : [...files.slice(0, -1), { ...upper, storage: recorder }]);
  const image = opened.at(-1)?.image as Image;
  const first = Math.max(0, files.length - 1 - levels);
  const between = opened
    .slice(first, -1)
    .map(({ layer }) => layer)
    .reverse();
  const base = opened[first - 1]?.backing;
  preparePull(image);
  return { files, opened, upper, image, base, steps: pullUp(image, between, base) };
}

/** The upper image over the base alone. */
function expectOverBase({ files, upper }: Pulling, levels: number, content: Uint8Array): void {
  qemuCheck(upper.storage);
  const first = Math.max(0, files.length - 1 - levels);
  const opened = openChain([...files.slice(0, first), upper]);
  expectContent(opened.at(-1)?.image as Image, content, 'over the base');
}

const build = (formats: (typeof chainFormats)[number]['formats'], scripts: readonly unknown[]): File[] =>
  buildChain(formats.map((format, index) => ({ format, changes: scripts[index] as Change[] })));

describe('pull', () => {
  it.each(chainFormats)(
    'brings what is below into the image, which reads the same at each step and over the base: $name',
    async ({ formats }) => {
      await fc.assert(
        fc.asyncProperty(
          fc.tuple(...formats.map(() => changes(8))),
          fc.integer({ min: 1, max: 2 }),
          fc.array(fc.record({ change: changes(1), steps: fc.integer({ min: 0, max: 2 }) }), { maxLength: 6 }),
          async (scripts, levels, later) => {
            const pull = pulling(build(formats, scripts), levels);
            const { image, upper } = pull;
            for (const { change: some, steps: count } of later) {
              for (let step = 0; step < count; step++) pull.steps.next();
              for (const one of some) change(image, upper.content, one);
              expectContent(image, upper.content, 'in the middle');
            }
            atOnce(pull.steps);
            expectContent(image, upper.content, 'over the old chain');
            flush(image);
            closeChain(pull.opened);
            expectOverBase(pull, levels, upper.content);
          },
        ),
        { numRuns: propertyRuns(20) },
      );
    },
  );

  it.each(chainFormats)('moves no more than was estimated: $name', async ({ formats }) => {
    await fc.assert(
      fc.asyncProperty(fc.tuple(...formats.map(() => changes(8))), async (scripts) => {
        const files = build(formats, scripts);
        const { opened, image, upper } = pulling(files, 1);
        const between = [(opened.at(-2) as Opened).layer];
        const base = opened.at(-3)?.backing;
        const cost = atOnce(pullCost(image, between, base));
        const before = upper.storage.size();
        const moved = atOnce(pullUp(image, between, base));
        expect(moved).toBeLessThanOrEqual(cost.moved);
        flush(image);
        expect(upper.storage.size() - before).toBeLessThanOrEqual(cost.allocated);
      }),
      { numRuns: propertyRuns(20) },
    );
  });

  const crashing = chainFormats.filter(({ name }) =>
    /equal|subclusters over|version 2, which|shorter image|large clusters over/.test(name),
  );

  it.each(crashing)(
    'a crash leaves an image that reads the same, and can be pulled into again: $name',
    async ({ formats }) => {
      await fc.assert(
        fc.asyncProperty(fc.tuple(...formats.map(() => changes(5))), async (scripts) => {
          const files = build(formats, scripts);
          const upper = files.at(-1) as File;
          const before = upper.storage.copy();
          const recorder = new Recorder(upper.storage);
          const { image, opened, steps } = pulling(files, 1, recorder);
          let step = 0;
          for (const _ of steps) if (++step % 5 === 0) flush(image);
          flush(image);
          recorder.mark('pulled');
          closeChain(opened);
          const all = [...crashImages(before, recorder.operations, { samples: 1, exhaustive: 2 })];
          const every = Math.max(1, Math.floor(all.length / 25));
          for (const [index, { file, label, marks }] of all.entries()) {
            if (index % every !== 0 && marks.length === 0) continue;
            recover(file);
            expect(await checkImage(file.copy(), readHeader(file)), label).toMatchObject({ corruptions: 0, leaks: 0 });
            const again = [...files.slice(0, -1), { ...upper, storage: file }];
            if (marks.length === 0) {
              const second = pulling(again, 1);
              expectContent(second.image, upper.content, label);
              atOnce(second.steps);
              closeChain(second.opened);
            }
            const alone = openChain([...files.slice(0, Math.max(0, files.length - 2)), again.at(-1) as File]);
            expectContent(alone.at(-1)?.image as Image, upper.content, `${label}: over the base`);
          }
        }),
        { numRuns: propertyRuns(5), endOnFailure: true },
      );
    },
  );

  it('can be broken off by a full disk at any change, and done again', async () => {
    const script: Change[] = [
      { do: 'write', at: 0.1, length: 0.6, byte: 7 },
      { do: 'zero', at: 0.4, length: 0.5, byte: 0 },
      { do: 'write', at: 0.9, length: 0.9, byte: 9 },
    ];
    const formats = chainFormats[0]!.formats;
    for (let at = 0; ; at++) {
      const files = build(
        formats,
        formats.map((_, index) =>
          script.map((one) => ({ ...one, at: (one.at + 0.3 * index) % 1, byte: one.byte + index })),
        ),
      );
      const upper = files.at(-1) as File;
      const recorder = new Recorder(upper.storage);
      const { image, steps } = pulling(files, 1, recorder);
      recorder.fail({ at, how: 'ENOSPC', times: Number.POSITIVE_INFINITY });
      let failed = false;
      try {
        await inSteps(steps);
        flush(image);
      } catch (error) {
        expect((error as { errno?: string }).errno).toMatch(/ENOSPC|EIO/);
        failed = true;
      }
      recorder.fail(undefined);
      expectContent(image, upper.content, `change ${at} failed`);
      if (!failed) break;
      recover(upper.storage);
      const again = pulling(files, 1);
      expectContent(again.image, upper.content, `change ${at} failed, opened again`);
      atOnce(again.steps);
      closeChain(again.opened);
      expectOverBase(again, 1, upper.content);
    }
  });

  it('zeros take no space: over nothing they stay unallocated, over data they are zero clusters', () => {
    const size = 64 * 1024;
    const format = { size, clusterBytes: 4096 };
    const zeros: Change = { do: 'write', at: 0, length: 1, byte: 0 };
    const kindsAfter = (files: File[], levels: number): string[] => {
      const { image, steps } = pulling(files, levels);
      expect(atOnce(steps)).toBe(0);
      return [...new Set([...ownExtents(imageLayer(image), 0, size)].map(({ kind }) => kind))];
    };
    const written = buildChain([
      { format, changes: [{ ...zeros, byte: 1 }] },
      { format, changes: [zeros] },
      { format, changes: [] },
    ]);
    expect(kindsAfter(written, 1)).toEqual(['zero']);
    const nothing = buildChain([
      { format, changes: [zeros] },
      { format, changes: [] },
    ]);
    expect(kindsAfter(nothing, 1)).toEqual(['unallocated']);
  });

  it('what is discarded behind the end of the image below stays hidden over a longer base', () => {
    const written: Change = { do: 'write', at: 0, length: 1, byte: 5 };
    const files = buildChain([
      { format: { size: 131_072, clusterBytes: 4096 }, changes: [written] },
      { format: { size: 32_768, clusterBytes: 4096 }, changes: [] },
      { format: { size: 131_072, clusterBytes: 4096 }, changes: [{ ...written, byte: 6 }] },
    ]);
    const pull = pulling(files, 1);
    atOnce(pull.steps);
    change(pull.image, pull.upper.content, { do: 'discard', at: 0.5, length: 1, byte: 0 });
    closeChain(pull.opened);
    expectOverBase(pull, 1, pull.upper.content);
  });

  it('what the guest writes while a piece is read below is not overwritten', () => {
    for (const clusterBytes of [4096, 65_536]) {
      const extendedL2 = clusterBytes > 4096;
      const files = buildChain([
        { format: { size: 262_144, clusterBytes: 4096 }, changes: [{ do: 'write', at: 0, length: 1, byte: 5 }] },
        { format: { size: 262_144, clusterBytes, extendedL2 }, changes: [] },
      ]);
      const [lower, upper] = files as [File, File];
      const { backing, layer } = openChain([lower])[0] as Opened;
      let image: Image | undefined;
      const guest: Change = { do: 'write', at: 0.3, length: 0.4, byte: 7 };
      const { image: opened } = openSession(upper.storage, upper.storage, {
        ...backing,
        read: (target, at, length, offset) => {
          backing.read(target, at, length, offset);
          if (image === undefined || length < 100_000) return;
          const once = image;
          image = undefined;
          change(once, upper.content, guest);
        },
      });
      image = opened;
      preparePull(opened);
      atOnce(pullUp(opened, [layer], undefined));
      expect(image).toBe(undefined);
      expectContent(opened, upper.content, `clusters of ${clusterBytes}`);
    }
  });

  it('waits while the gate is closed', () => {
    const format = { size: 65_536, clusterBytes: 4096 };
    const files = buildChain([
      { format, changes: [{ do: 'write', at: 0, length: 1, byte: 1 }] },
      { format, changes: [] },
    ]);
    const { image, steps } = pulling(files, 1);
    image.words[1] = 1;
    expect(steps.next()).toEqual({ done: false, value: 0 });
    image.words[1] = 0;
    expect(steps.next()).toEqual({ done: false, value: 1 });
    closeSession({ ...openSession(files[0]!.storage), image });
  });
});
