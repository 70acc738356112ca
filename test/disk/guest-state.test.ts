/** Checkpoints with the state of a guest: written beside the frozen disk, kept as a tar archive in the snapshot. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Checkpoint, Contents, Disk } from '../../src/disk/disk.ts';
import { openDisk } from '../../src/disk/open-disk.ts';
import type { GuestIdentity } from '../../src/guest/guest.ts';

const KIB = 1024;
const MIB = 1024 * KIB;

const guest: GuestIdentity = {
  kind: 'bhyve',
  name: 'vm1',
  version: '14.1',
  hostRelease: '1401000',
  argv: ['bhyve', '-c', '2', 'vm1'],
};

/** Bytes that are those of no other seed. Never 0. */
function pattern(length: number, seed: number): Buffer {
  let state = seed;
  return Buffer.alloc(length).map(() => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return 1 + ((state >>> 16) % 255);
  }) as Buffer;
}

const write = (contents: Contents, bytes: Uint8Array, offset: number): void =>
  void expect(contents.write(bytes, 0, bytes.length, offset)).toBe(true);

function read(contents: Contents, offset = 0, length = contents.size() - offset): Buffer {
  const target = Buffer.alloc(length, 0xee);
  contents.read(target, 0, length, offset);
  return target;
}

let folder: string;
let image: string;

const qemuImg = (...args: string[]): string => execFileSync('qemu-img', args, { encoding: 'utf8' });

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'vdskfs-guest-state-'));
  image = join(folder, 'vm1.qcow2');
});

afterEach(() => rmSync(folder, { recursive: true, force: true }));

async function withDisk<T>(action: (disk: Disk) => Promise<T>): Promise<T> {
  const disk = await openDisk(image, { readOnly: false });
  try {
    return await action(disk);
  } finally {
    await disk.close();
  }
}

const named = (disk: Disk, name: string): Checkpoint =>
  disk.checkpoints().find((checkpoint) => checkpoint.name === name) as Checkpoint;

function stateOf(disk: Disk, checkpoint: Checkpoint, name: string): Buffer {
  const open = disk.openState(checkpoint, name);
  try {
    return read(open.contents);
  } finally {
    open[Symbol.dispose]();
  }
}

const variants: readonly { name: string; options: readonly string[] }[] = [
  { name: '64 KiB clusters', options: [] },
  { name: '512-byte clusters', options: ['-o', 'cluster_size=512'] },
  { name: '2 MiB clusters', options: ['-o', 'cluster_size=2M'] },
  { name: 'version 2', options: ['-o', 'compat=0.10'] },
  { name: 'subclusters', options: ['-o', 'extended_l2=on'] },
  { name: 'preallocated metadata', options: ['-o', 'preallocation=metadata'] },
  { name: '2-bit refcounts', options: ['-o', 'refcount_bits=2'] },
];

describe.each(variants)('with $name', ({ options }) => {
  it('keeps the disk and the state of one instant', async () => {
    qemuImg('create', '-q', '-f', 'qcow2', ...options, image, '16M');
    const before = pattern(3 * MIB, 1);
    const memory = Buffer.concat([pattern(300_000, 2), Buffer.alloc(1 * MIB), pattern(70_001, 3)]);
    const kern = pattern(90_000, 4);
    const meta = Buffer.from('{"basic metadata": {}}');
    await withDisk(async (disk) => {
      const live = disk.openLive().contents;
      write(live, before, MIB);
      const pending = await disk.freeze('internal', 'running');
      const state = pending.createState('state').contents;
      const kernFile = pending.createState('state.kern').contents;
      write(state, memory.subarray(100_000), 100_000);
      write(live, pattern(2 * MIB, 5), MIB + 777);
      write(kernFile, kern, 0);
      write(state, memory.subarray(0, 100_000), 0);
      const metaFile = pending.createState('state.meta').contents;
      write(metaFile, meta, 0);
      expect(read(state).equals(memory)).toBe(true);
      expect(disk.checkpoints()).toEqual([]);
      const checkpoint = await pending.publish({ consistency: 'memory', guest });
      expect(disk.checkpoints()).toEqual([checkpoint]);
    });
    await withDisk(async (disk) => {
      const checkpoint = named(disk, 'running');
      expect(checkpoint).toMatchObject({
        consistency: 'memory',
        stateFiles: [
          { name: 'state', bytes: memory.length },
          { name: 'state.kern', bytes: kern.length },
          { name: 'state.meta', bytes: meta.length },
        ],
      });
      expect(disk.details(checkpoint)).toEqual({ consistency: 'memory', guest });
      expect(stateOf(disk, checkpoint, 'state').equals(memory)).toBe(true);
      expect(stateOf(disk, checkpoint, 'state.kern').equals(kern)).toBe(true);
      expect(stateOf(disk, checkpoint, 'state.meta').equals(meta)).toBe(true);
      const open = disk.openCheckpoint(checkpoint);
      expect(read(open.contents, MIB, before.length).equals(before)).toBe(true);
      open[Symbol.dispose]();
      expect(qemuImg('check', image, '-U')).toContain('No errors');
      await disk.rollback(checkpoint);
      expect(read(disk.openLive().contents, MIB, before.length).equals(before)).toBe(true);
      await disk.deleteCheckpoint(checkpoint);
    });
    expect(qemuImg('check', image)).toContain('No errors');
  });
});
