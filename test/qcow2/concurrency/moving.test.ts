/** Threads that read and write a chain while data moves between its images (commit-down.ts, pull-up.ts). */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { describe, expect, it } from 'vitest';
import type { SharedLayer } from '../../../src/disk/chain.ts';
import type { CreateOptions } from '../../../src/qcow2/create.ts';
import type { Backing, Image } from '../../../src/qcow2/image.ts';
import type { Steps } from '../../../src/qcow2/steps.ts';
import type { HostFile as HostFileType } from '../../../src/storage/host-file.ts';
import { CELL_BYTES, CELLS, makeShared, phase, putCells, random, stamp, stampOf, word } from './cells.mjs';

const THREADS = 3;
/** What one variant may take. */
const RUN_MS = 700;
const SIZE = CELLS * CELL_BYTES;

/** The workers use what was built; so does this thread, since they share memory. */
const built = async <T>(path: string): Promise<T> =>
  (await import(new URL(`../../../dist/${path}`, import.meta.url).href)) as T;
const { createImage } = await built<typeof import('../../../src/qcow2/create.ts')>('qcow2/create.js');
const { openImage, closeImage } = await built<typeof import('../../../src/qcow2/open-image.ts')>('qcow2/open-image.js');
const { readHeader } = await built<typeof import('../../../src/qcow2/header.ts')>('qcow2/header.js');
const { imageBacking } = await built<typeof import('../../../src/qcow2/layer.ts')>('qcow2/layer.js');
const { imageLayer } = await built<typeof import('../../../src/qcow2/own-extents.ts')>('qcow2/own-extents.js');
const { writeRange } = await built<typeof import('../../../src/qcow2/write.ts')>('qcow2/write.js');
const { zeroRange } = await built<typeof import('../../../src/qcow2/discard.ts')>('qcow2/discard.js');
const { readRange } = await built<typeof import('../../../src/qcow2/read.ts')>('qcow2/read.js');
const { flush } = await built<typeof import('../../../src/qcow2/flush.ts')>('qcow2/flush.js');
const { closeGate, openGate } = await built<typeof import('../../../src/qcow2/gate.ts')>('qcow2/gate.js');
const { atOnce } = await built<typeof import('../../../src/qcow2/steps.ts')>('qcow2/steps.js');
const { trackWrites, writtenBytes } =
  await built<typeof import('../../../src/qcow2/written-map.ts')>('qcow2/written-map.js');
const { imageTarget } = await built<typeof import('../../../src/qcow2/commit-target.ts')>('qcow2/commit-target.js');
const commit = await built<typeof import('../../../src/qcow2/commit-down.ts')>('qcow2/commit-down.js');
const { shareRun } = await built<typeof import('../../../src/disk/frozen-run.ts')>('disk/frozen-run.js');
const pull = await built<typeof import('../../../src/qcow2/pull-up.ts')>('qcow2/pull-up.js');
const { HostFile } = await built<typeof import('../../../src/storage/host-file.ts')>('storage/host-file.js');

interface Layer {
  readonly path: string;
  readonly file: HostFileType;
  readonly image: Image;
  readonly shared: SharedLayer;
}

type Format = Omit<CreateOptions, 'size' | 'backing'>;

let chains = 0;
/** Layers that were opened: each has an id of its own. */
let opened = 0;

/** All images of a chain open for writing, as the threads share them; bottom first. */
class Chain implements Disposable {
  readonly layers: Layer[] = [];
  readonly #cacheBytes: number;

  constructor(paths: readonly string[], cacheBytes: number) {
    this.#cacheBytes = cacheBytes;
    for (const path of paths) this.#open(path);
  }

  /** From the top. */
  at(depth: number): Layer {
    return this.layers.at(-1 - depth) as Layer;
  }

  get top(): Image {
    return this.at(0).image;
  }

  backingOf(depth: number): Backing | undefined {
    return depth + 1 < this.layers.length ? imageBacking(this.at(depth + 1).image) : undefined;
  }

  /** @param merged everything below the top, which nobody may write then, as one */
  view(merged = false): unknown {
    const chain = this.layers.map(({ shared }) => shared).reverse();
    const [top, next, ...others] = chain as [SharedLayer, SharedLayer, ...SharedLayer[]];
    const shared = merged ? [top, { ...next, run: shareRun([next, ...others], 0) }, ...others] : chain;
    return { id: -++chains, kind: 'live', chain: shared };
  }

  content(): Uint8Array {
    const bytes = new Uint8Array(SIZE);
    readRange(this.top, undefined, bytes, 0, SIZE, 0);
    return bytes;
  }

  [Symbol.dispose](): void {
    for (const { image, file } of this.layers) {
      closeImage(image);
      file[Symbol.dispose]();
    }
  }

  #open(path: string): void {
    const file = HostFile.open(path, { readOnly: false });
    const below = this.layers.at(-1);
    const { image, shared } = openImage({
      file,
      data: file,
      backing: below === undefined ? undefined : imageBacking(below.image),
      header: readHeader(file),
      snapshots: { entries: [], bytes: 0 },
      writable: true,
      cacheBytes: this.#cacheBytes,
    });
    this.layers.push({
      path,
      file,
      image,
      shared: { id: ++opened, format: 'qcow2', file: file.share(), data: undefined, image: shared },
    });
  }
}

/** A chain of images on disk, bottom first, with cells of nobody's in each of them. */
function makeChain(folder: string, formats: readonly Format[], seed: number): string[] {
  const below = random(seed);
  const paths: string[] = [];
  const bytes = new Uint8Array(SIZE);
  const cells = new Int32Array(bytes.buffer);
  for (const [index, format] of formats.entries()) {
    const path = join(folder, `layer${index}.qcow2`);
    const file = paths.at(-1);
    createImage(path, { ...format, size: SIZE, ...(file && { backing: { file, format: 'qcow2' as const } }) });
    paths.push(path);
    // The top one begins empty.
    if (index > 0 && index === formats.length - 1) break;
    using chain = new Chain(paths, 0);
    for (let count = 0; count < 60; count++) {
      const first = below(CELLS);
      const length = 1 + below(Math.min(4096, CELLS - first));
      if (below(4) === 0) {
        zeroRange(chain.top, first * CELL_BYTES, length * CELL_BYTES, 'free');
      } else {
        putCells(cells, first, length, stamp(THREADS + 1 + index, count + 1));
        // `putCells` fills from the start of the array.
        writeRange(chain.top, bytes, 0, length * CELL_BYTES, first * CELL_BYTES);
      }
    }
  }
  return paths;
}

const giveWay = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 2));

async function slowly<T>(steps: Steps<T>): Promise<T> {
  for (;;) {
    const step = steps.next();
    if (step.done === true) return step.value;
    await giveWay();
  }
}

/** Run the threads on the chain for as long as `body` takes. */
async function withThreads(chain: Chain, seed: number, body: () => Promise<void>, merged = false): Promise<void> {
  const shared = makeShared(THREADS);
  const words = new Int32Array(chain.content().buffer);
  for (let cell = 0; cell < CELLS; cell++) {
    const found = stampOf(words.subarray(cell * 4, cell * 4 + 4), 0, cell);
    if (found === undefined) throw new Error(`cell ${cell} is torn before anything began`);
    shared.base[cell] = found;
  }
  const disk = chain.view(merged);
  const workers: Worker[] = [];
  try {
    const ended = Array.from({ length: THREADS }, (_, thread) => {
      const worker = new Worker(new URL('./worker.mjs', import.meta.url), {
        workerData: { thread, threads: THREADS, seed, shared, disk },
      });
      workers.push(worker);
      return new Promise<unknown>((resolve) => {
        worker.once('message', resolve);
        worker.once('error', (error) => resolve({ error: String(error) }));
      });
    });
    // They take a while to start: each has done something before the move begins.
    const begun = (thread: number): boolean => Atomics.load(shared.words, word.DONE + thread) > 0;
    const failed = Promise.race(ended).then((result) => {
      throw new Error(`a thread ended early: ${JSON.stringify(result)}`);
    });
    failed.catch(() => {});
    const started = async (): Promise<void> => {
      while (!Array.from({ length: THREADS }, (_, thread) => thread).every(begun)) await giveWay();
    };
    try {
      await Promise.race([failed, started()]);
      await Promise.race([failed, body()]);
    } finally {
      Atomics.store(shared.words, word.PHASE, phase.STOP);
      for (const result of await Promise.all(ended)) expect(result).toEqual({ operations: expect.any(Number) });
    }
  } finally {
    for (const worker of workers) await worker.terminate();
  }
}

/** What the chain holds with its writers stopped for a moment. */
function still<T>(image: Image, action: () => T): T {
  closeGate(image);
  try {
    return action();
  } finally {
    openGate(image);
  }
}

const expectSame = (found: Uint8Array, expected: Uint8Array): void => {
  if (Buffer.compare(found, expected) === 0) return;
  throw new Error(`byte ${found.findIndex((byte, index) => byte !== expected[index])} has changed`);
};

interface Variant {
  readonly name: string;
  /** Bottom first. */
  readonly formats: readonly Format[];
  readonly cacheBytes: number;
}

const variants: readonly Variant[] = [
  {
    name: 'small clusters over large ones',
    formats: [{}, { clusterBytes: 65536 }, { clusterBytes: 4096 }],
    cacheBytes: 0,
  },
  {
    name: 'large clusters over small ones',
    formats: [{}, { clusterBytes: 2048 }, { clusterBytes: 65536 }],
    cacheBytes: 2 ** 20,
  },
  {
    name: 'subclusters',
    formats: [{}, { clusterBytes: 16384, extendedL2: true }, { clusterBytes: 65536, extendedL2: true }],
    cacheBytes: 2 ** 20,
  },
  {
    name: 'version 2',
    formats: [{}, { version: 2, clusterBytes: 4096 }, { version: 2, clusterBytes: 8192 }],
    cacheBytes: 0,
  },
];

/** Again and again, each time with a fresh chain, until the time is up. @param body returns the files as they are to be opened then */
async function repeatedly(
  { formats, cacheBytes }: Variant,
  body: (chain: Chain, paths: readonly string[], seed: number) => Promise<readonly string[]>,
): Promise<void> {
  const end = Date.now() + RUN_MS;
  for (let seed = 1; seed === 1 || Date.now() < end; seed++) {
    const folder = mkdtempSync(join(tmpdir(), 'vdskfs-moving-'));
    try {
      const paths = makeChain(folder, formats, seed);
      let after: readonly string[];
      let expected: Uint8Array;
      {
        using chain = new Chain(paths, cacheBytes);
        after = await body(chain, paths, seed);
        flush(chain.top);
        expected = chain.content();
      }
      for (const path of after) execFileSync('qemu-img', ['check', path], { stdio: 'pipe' });
      using chain = new Chain(after, cacheBytes);
      expectSame(chain.content(), expected);
    } finally {
      rmSync(folder, { recursive: true });
    }
  }
}

describe('threads that write, discard, flush and read', () => {
  it.each(variants)('lose nothing while what is below is pulled up: $name', async (variant) => {
    await repeatedly(variant, async (chain, paths, seed) => {
      await withThreads(chain, seed, async () => {
        pull.preparePull(chain.top);
        await slowly(pull.pullUp(chain.top, [imageLayer(chain.at(1).image)], chain.backingOf(1)));
        await giveWay();
      });
      return [...paths.slice(0, -2), paths.at(-1) as string];
    });
  });

  it.each(variants)('lose nothing while their image is committed: $name', async (variant) => {
    await repeatedly(variant, async (chain, paths, seed) => {
      await withThreads(chain, seed, async () => {
        const target = imageTarget(chain.at(1).image);
        await commit.prepareCommit(chain.top, target);
        trackWrites(chain.top);
        await slowly(commit.commitAll(chain.top, target));
        for (let round = 0; round < 3; round++) await slowly(commit.commitWritten(chain.top, target));
        closeGate(chain.top);
        try {
          atOnce(commit.commitWritten(chain.top, target));
          expect(writtenBytes(chain.top)).toBe(0);
          await commit.finishCommit(chain.top, target, { shrink: false });
          const below = new Uint8Array(SIZE);
          readRange(chain.at(1).image, undefined, below, 0, SIZE, 0);
          expectSame(below, chain.content());
        } finally {
          openGate(chain.top);
        }
      });
      // What was written behind the gate is in the top image only.
      return paths;
    });
  });

  it.each(variants)('lose nothing while an image below theirs is committed: $name', async (variant) => {
    await repeatedly(
      { ...variant, formats: [...variant.formats.slice(1), variant.formats.at(-1) as Format] },
      async (chain, paths, seed) => {
        await withThreads(chain, seed, async () => {
          const target = imageTarget(chain.at(2).image);
          await commit.prepareCommit(chain.at(1).image, target);
          await slowly(commit.commitAll(chain.at(1).image, target));
          await commit.finishCommit(chain.at(1).image, target, { shrink: false });
          still(chain.top, () => {
            const below = new Uint8Array(SIZE);
            const upper = new Uint8Array(SIZE);
            readRange(chain.at(2).image, undefined, below, 0, SIZE, 0);
            readRange(chain.at(1).image, undefined, upper, 0, SIZE, 0);
            expectSame(below, upper);
          });
        });
        return [...paths.slice(0, -2), paths.at(-1) as string];
      },
    );
  });

  it.each(variants)('see the layers below as they are, merged into one: $name', async (variant) => {
    await repeatedly(variant, async (chain, paths, seed) => {
      const end = Date.now() + RUN_MS / 2;
      const working = async (): Promise<void> => {
        while (Date.now() < end) await giveWay();
      };
      await withThreads(chain, seed, working, true);
      return paths;
    });
  });
});
