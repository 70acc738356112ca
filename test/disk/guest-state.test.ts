/** Checkpoints with the state of a guest: written beside the frozen disk, kept as a tar archive in the snapshot. */
import { execFileSync } from 'node:child_process';
import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
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

/** The VM state of a snapshot as QEMU reads it. */
function vmStateByQemu(name: string, bytes: number): Buffer {
  const copy = join(folder, 'copy.qcow2');
  copyFileSync(image, copy);
  qemuImg('snapshot', '-a', name, copy);
  const dump = execFileSync('qemu-io', ['-f', 'qcow2', '-c', `read -bv 0 ${bytes}`, copy], {
    encoding: 'utf8',
    maxBuffer: 64 * MIB,
  });
  const lines = dump.match(/^[0-9a-f]{8}: {2}(?:[0-9a-f]{2} )+/gm) ?? [];
  return Buffer.concat(lines.map((line) => Buffer.from(line.slice(10).replaceAll(' ', ''), 'hex')));
}

async function takeWithMemory(disk: Disk, memory: Uint8Array, identity: GuestIdentity = guest): Promise<Checkpoint> {
  const pending = await disk.freeze('internal', 'running');
  write(pending.createState('state').contents, memory, 0);
  write(pending.createState('state.meta').contents, Buffer.from('{}'), 0);
  return pending.publish({ consistency: 'memory', guest: identity });
}

describe('a checkpoint with memory', () => {
  beforeEach(() => void qemuImg('create', '-q', '-f', 'qcow2', image, '16M'));

  it('has a tar archive as its VM state, for QEMU too', async () => {
    const memory = pattern(70_000, 1);
    const { vmStateSize } = await withDisk((disk) => takeWithMemory(disk, memory));
    expect(qemuImg('snapshot', '-l', image)).toMatch(/running +[\d.]+ KiB/);
    const archive = vmStateByQemu('running', vmStateSize);
    expect(archive.length).toBe(vmStateSize);
    const unpacked = join(folder, 'unpacked');
    mkdirSync(unpacked);
    writeFileSync(join(folder, 'state.tar'), archive);
    execFileSync('tar', ['xf', join(folder, 'state.tar'), '-C', unpacked]);
    expect(readFileSync(join(unpacked, 'state')).equals(memory)).toBe(true);
    expect(readFileSync(join(unpacked, 'state.meta'), 'utf8')).toBe('{}');
    expect(JSON.parse(readFileSync(join(unpacked, 'checkpoint.json'), 'utf8'))).toMatchObject({
      consistency: 'memory',
      guest,
    });
  });

  it('survives what QEMU does to the image', async () => {
    const memory = pattern(70_000, 1);
    await withDisk((disk) => takeWithMemory(disk, memory));
    qemuImg('snapshot', '-c', 'by QEMU', image);
    qemuImg('snapshot', '-a', 'running', image);
    qemuImg('snapshot', '-d', 'by QEMU', image);
    await withDisk(async (disk) => {
      const checkpoint = named(disk, 'running');
      expect(disk.details(checkpoint)).toEqual({ consistency: 'memory', guest });
      expect(stateOf(disk, checkpoint, 'state').equals(memory)).toBe(true);
    });
    qemuImg('snapshot', '-d', 'running', image);
    expect(qemuImg('check', image)).toContain('No errors');
  });

  it('takes no space for zeros', () =>
    withDisk(async (disk) => {
      const before = statSync(image).size;
      const memory = Buffer.alloc(64 * MIB);
      memory.fill(1, 20 * MIB, 20 * MIB + 100);
      const checkpoint = await takeWithMemory(disk, memory);
      expect(statSync(image).size - before).toBeLessThan(MIB);
      expect(checkpoint.stateFiles[0]).toEqual({ name: 'state', bytes: 64 * MIB, allocatedBytes: 64 * KIB });
      expect(stateOf(disk, checkpoint, 'state').equals(memory)).toBe(true);
      using state = disk.openState(checkpoint, 'state');
      expect(state.contents.nextData(0)).toBe(20 * MIB);
      expect(state.contents.nextHole(20 * MIB)).toBe(20 * MIB + 64 * KIB);
    }));

  it('remembers a guest whose arguments are long', async () => {
    const talkative = { ...guest, argv: Array.from({ length: 300 }, (_, index) => `--argument=${index}`) };
    await withDisk((disk) => takeWithMemory(disk, pattern(1000, 1), talkative));
    await withDisk(async (disk) => expect(disk.details(named(disk, 'running')).guest).toEqual(talkative));
  });

  it('leaves nothing when it is given up, or the disk is closed', async () => {
    for (const ending of ['abandon', 'close'] as const) {
      const live = pattern(MIB, 3);
      await withDisk(async (disk) => {
        const pending = await disk.freeze('internal', 'running');
        const { contents } = pending.createState('state');
        write(contents, pattern(300_000, 4), 0);
        write(disk.openLive().contents, live, 0);
        expect(() => pending.createState('state')).toThrow(expect.objectContaining({ errno: 'EEXIST' }));
        expect(() => pending.createState('other')).toThrow(expect.objectContaining({ errno: 'EINVAL' }));
        if (ending === 'abandon') {
          await pending.abandon();
          await pending.abandon();
          expect(() => contents.write(live, 0, 1000, 0)).toThrow(expect.objectContaining({ errno: 'EROFS' }));
        }
      });
      await withDisk(async (disk) => {
        expect(disk.checkpoints()).toEqual([]);
        expect(read(disk.openLive().contents, 0, MIB).equals(live)).toBe(true);
      });
      expect(qemuImg('check', image)).toContain('No errors');
    }
  });

  it('is written by several threads at once', async () => {
    // The threads use what was built, and so must whoever shares memory with them.
    const built = new URL('../../dist/disk/open-disk.js', import.meta.url).href;
    const { openDisk: openBuilt } = (await import(built)) as { openDisk: typeof openDisk };
    const disk = await openBuilt(image, { readOnly: false });
    const threads = 3;
    // Not a multiple of the cluster size: threads meet in clusters.
    const [pieces, pieceBytes] = [500, 30_001];
    try {
      const pending = await disk.freeze('internal', 'running');
      const { shared } = pending.createState('state');
      const workers = Array.from({ length: threads }, (_, thread) => {
        const workerData = { shared, thread, threads, pieces, pieceBytes };
        const worker = new Worker(new URL('./state-writer.mjs', import.meta.url), { workerData });
        return new Promise<void>((resolve, reject) => worker.on('error', reject).on('exit', () => resolve()));
      });
      const live = disk.openLive().contents;
      for (let at = 0; at < 8 * MIB; at += 64 * KIB) write(live, Buffer.alloc(64 * KIB, 7), at);
      await Promise.all(workers);
      const checkpoint = await pending.publish({ consistency: 'memory' });
      const state = stateOf(disk, checkpoint, 'state');
      const expected = Buffer.concat(
        Array.from({ length: pieces }, (_, index) => Buffer.alloc(pieceBytes, (index % 251) + 1)),
      );
      expect(state.equals(expected)).toBe(true);
    } finally {
      await disk.close();
    }
    expect(qemuImg('check', image)).toContain('No errors');
  });
});

describe('a checkpoint without memory', () => {
  beforeEach(() => void qemuImg('create', '-q', '-f', 'qcow2', image, '16M'));

  it('remembers that the file systems stood still', async () => {
    await withDisk(async (disk) => {
      const taken = await disk.takeCheckpoint('still', { consistency: 'frozen' });
      expect(taken).toMatchObject({ consistency: 'frozen', stateFiles: [], vmStateSize: 0 });
      await disk.takeCheckpoint('plain');
    });
    qemuImg('snapshot', '-d', 'plain', image);
    await withDisk(async (disk) => {
      const renamed = await disk.renameCheckpoint(named(disk, 'still'), 'renamed');
      expect(disk.details(renamed)).toEqual({ consistency: 'frozen', guest: undefined });
      expect(() => disk.openState(renamed, 'state')).toThrow(expect.objectContaining({ errno: 'ENOENT' }));
    });
  });

  it('is of one instant on disks that are held', async () => {
    await withDisk(async (disk) => {
      const live = disk.openLive().contents;
      write(live, pattern(MIB, 1), 0);
      const hold = await disk.holdWrites();
      const pending = await disk.freeze('internal', 'held');
      expect(live.write(Buffer.alloc(10), 0, 10, 0)).toBe(false);
      let opened = false;
      const waiting = disk.whenOpen().then(() => {
        opened = true;
      });
      await pending.publish({ consistency: 'crash' });
      expect(opened).toBe(false);
      await hold[Symbol.asyncDispose]();
      await waiting;
      write(live, Buffer.alloc(10), 0);
      using open = disk.openCheckpoint(named(disk, 'held'));
      expect(read(open.contents, 0, MIB).equals(pattern(MIB, 1))).toBe(true);
    });
  });
});
