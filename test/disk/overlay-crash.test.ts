/** A process that dies in the middle of what is done to overlays: nothing is lost, and nothing is in the way of going on. */
import { cpSync, mkdirSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import type { Disk } from '../../src/disk/disk.ts';
import { openDisk } from '../../src/disk/open-disk.ts';
import { FsError } from '../../src/errors.ts';
import { createImage } from '../../src/qcow2/create.ts';
import { Died, dyingAt } from './dying-process.ts';
import { bytesOf, digest, qemuCheck, qemuDigest } from './overlay-disk.ts';

const K = 1024;
const DISK_BYTES = 512 * K;

const opened = (folder: string): Promise<Disk> => openDisk(join(folder, 'vm1.qcow2'), { readOnly: false });

function write(disk: Disk, fill: number, offset: number, length: number): void {
  using live = disk.openLive();
  live.contents.write(new Uint8Array(length).fill(fill), 0, length, offset);
}

function liveOf(disk: Disk): string {
  using live = disk.openLive();
  return digest(bytesOf(live.contents));
}

const named = (disk: Disk, name: string) => disk.checkpoints().find((one) => one.name === name);

/** Contents of all external checkpoints that can be read; of one that is being merged away, its name. */
function pointsOf(disk: Disk): Map<string, string> {
  return new Map(
    disk.checkpoints().map((checkpoint) => {
      try {
        using open = disk.openCheckpoint(checkpoint);
        return [checkpoint.name, digest(bytesOf(open.contents))];
      } catch (error) {
        if (error instanceof FsError && error.errno === 'EBUSY') return [checkpoint.name, 'merging'];
        throw error;
      }
    }),
  );
}

/** A folder with vm1.qcow2 and the overlays a, b, c, of `sizes` bytes. */
async function makeChain(folder: string, sizes: readonly number[]): Promise<void> {
  createImage(join(folder, 'vm1.qcow2'), { size: DISK_BYTES, clusterBytes: 4096 });
  const disk = await opened(folder);
  for (const [index, bytes] of sizes.entries()) {
    write(disk, index + 1, index * 16 * K, bytes);
    if (index < sizes.length - 1) await disk.takeCheckpoint('abc'[index] as string, { kind: 'external' });
  }
  await disk.close();
}

interface Case {
  readonly what: string;
  readonly sizes: readonly number[];
  readonly change: (disk: Disk) => Promise<unknown>;
  /** The live contents may have become those of this checkpoint. */
  readonly mayShow?: string;
}

const [small, big] = [12 * K, 200 * K];
const remove =
  (name: string, discard = false) =>
  (disk: Disk) =>
    disk.deleteCheckpoint(named(disk, name) as NonNullable<ReturnType<typeof named>>, { discard });

const cases: readonly Case[] = [
  {
    what: 'taking a checkpoint',
    sizes: [small, small],
    change: (disk) => disk.takeCheckpoint('x', { kind: 'external' }),
  },
  { what: 'merging down, of a frozen layer', sizes: [big, small, small, small], change: remove('a') },
  { what: 'merging up, of a frozen layer', sizes: [small, big, small, small], change: remove('a') },
  { what: 'merging up, between overlays', sizes: [small, small, big, small], change: remove('b') },
  { what: 'merging down, of the live layer', sizes: [small, big, small], change: remove('b') },
  { what: 'merging up, of the live layer', sizes: [small, big], change: remove('a') },
  {
    what: 'renaming',
    sizes: [small, small, small],
    change: (disk) => disk.renameCheckpoint(named(disk, 'a') as never, 'x'),
  },
  {
    what: 'rolling back',
    sizes: [small, small, small],
    change: (disk) => disk.rollback(named(disk, 'a') as never),
    mayShow: 'a',
  },
  { what: 'discarding', sizes: [small, small, small], change: remove('a', true), mayShow: 'a' },
];

describe('a process that dies at any of its changes while', () => {
  it.each(cases)('$what', async ({ sizes, change, mayShow }) => {
    const root = mkdtempSync(join(tmpdir(), `vdskfs-dying-${process.pid}-`));
    try {
      const origin = join(root, 'origin');
      mkdirSync(origin);
      await makeChain(origin, sizes);
      const before = await opened(origin);
      const live = liveOf(before);
      const points = pointsOf(before);
      await before.close();

      // Every other one: the changes come in pairs of a write and its flush.
      for (let at = 0; ; at += at < 8 ? 1 : 2) {
        const folder = join(root, `at${at}`);
        cpSync(origin, folder, { recursive: true });
        const died = await dyingAt(at, async () => {
          const disk = await opened(folder);
          await change(disk);
          throw new Died('the end');
        }).catch((error) => {
          if (error instanceof Died) return false;
          throw error;
        });

        const allowed = [live, ...(mayShow === undefined ? [] : [points.get(mayShow)])];
        const disk = await opened(folder);
        expect(disk.readOnly, `change ${at}`).toBeUndefined();
        const found = liveOf(disk);
        expect(allowed, `change ${at}`).toContain(found);
        for (const [name, contents] of pointsOf(disk)) {
          const was = points.get(name);
          // A new name shows what some other one showed, or what was live.
          const known = was === undefined ? [...points.values(), live] : [was, 'merging'];
          expect(known, `change ${at}, checkpoint ${name}`).toContain(contents);
        }
        // With the last one goes what no checkpoint needs any more.
        await disk.takeCheckpoint('last', { kind: 'external' });
        for (const { name } of disk.checkpoints()) {
          const checkpoint = named(disk, name);
          if (checkpoint !== undefined) await disk.deleteCheckpoint(checkpoint);
        }
        expect(liveOf(disk), `change ${at}, all deleted`).toBe(found);
        await disk.close();
        expect(readdirSync(folder), `change ${at}`).toEqual(['vm1.qcow2']);
        if (at % 16 === 0 || !died) {
          qemuCheck(join(folder, 'vm1.qcow2'));
          expect(qemuDigest(join(folder, 'vm1.qcow2'))).toBe(found);
        }
        rmSync(folder, { recursive: true });
        if (!died) break;
      }
    } finally {
      rmSync(root, { recursive: true });
    }
  });
});
