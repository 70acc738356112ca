/** Images that another process writes, here qemu-img and qemu-io in the place of a guest. */
import { createHash } from 'node:crypto';
import { readFileSync, renameSync, statSync } from 'node:fs';
import { basename, join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { openAttachedDisk } from '../../src/disk/attached-disk.ts';
import type { Disk, OpenContents } from '../../src/disk/disk.ts';
import type { AttachedCheckpoints } from '../../src/guest/guest.ts';
import { runOk, withDirectory } from '../e2e/run.ts';

const MIB = 2 ** 20;

interface Place {
  readonly directory: string;
  readonly disk: Disk;
  /** What the guest was asked for. */
  readonly asked: string[];
  /** The guest fills the first mebibyte of its disk. */
  fill(byte: number): Promise<void>;
}

function withAttached(guest: Partial<AttachedCheckpoints>, body: (place: Place) => Promise<void>): Promise<void> {
  return withDirectory(async (directory) => {
    const image = join(directory, 'vm1.qcow2');
    await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '16M']);
    let active = image;
    const asked: string[] = [];
    const attached: AttachedCheckpoints = {
      async take(kind, name) {
        asked.push(`take ${kind} ${name}`);
        if (guest.take !== undefined) return guest.take(kind, name);
        if (kind === 'internal') return void (await runOk('qemu-img', ['snapshot', '-c', name, active]));
        const overlay = join(directory, `${name}.qcow2`);
        await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', basename(active), overlay]);
        active = overlay;
      },
      async delete(kind, name, onProgress) {
        asked.push(`delete ${kind} ${name}`);
        onProgress(0.5);
        if (kind === 'internal') return void (await runOk('qemu-img', ['snapshot', '-d', name, active]));
        await runOk('qemu-img', ['commit', '-q', active]);
        renameSync(active, `${active}.merged`);
        active = image;
      },
    };
    const disk = await openAttachedDisk(image, { name: 'vm1', timeoutMs: 500, guest: () => attached });
    try {
      const fill = async (byte: number) =>
        void (await runOk('qemu-io', ['-f', 'qcow2', '-c', `write -P ${byte} 0 1M`, active]));
      await body({ directory, disk, asked, fill });
    } finally {
      await disk.close();
    }
  });
}

function first({ contents, ...opened }: OpenContents): number {
  const bytes = new Uint8Array(1);
  contents.read(bytes, 0, 1, 0);
  opened[Symbol.dispose]();
  return bytes[0] as number;
}

const listed = (disk: Disk) => disk.checkpoints().map(({ kind, name }) => `${kind} ${name}`);

describe('a disk whose guest has the image open', () => {
  it('has its checkpoints taken and deleted by the guest', () =>
    withAttached({}, async ({ disk, asked, fill }) => {
      expect(disk.owner).toBe('attached');
      await fill(1);
      const a = await disk.takeCheckpoint('a');
      await fill(2);
      const x = await disk.takeCheckpoint('x', { kind: 'external' });
      await fill(3);
      const b = await disk.takeCheckpoint('b');
      await fill(4);
      expect(listed(disk).sort()).toEqual(['external x', 'internal a', 'internal b']);
      expect([a, x, b].map((one) => first(disk.openCheckpoint(one)))).toEqual([1, 2, 3]);
      expect(disk.checkpoints()).toContain(a);
      await disk.refresh('contents');
      expect(first(disk.openLive())).toBe(4);
      expect(disk.info()).toMatchObject({ name: 'vm1', image: disk.imagePath, chain: [{}, {}] });
      await disk.deleteCheckpoint(b);
      await disk.deleteCheckpoint(x);
      expect(listed(disk)).toEqual(['internal a']);
      expect(first(disk.openCheckpoint(a))).toBe(1);
      await disk.refresh('contents');
      expect(first(disk.openLive())).toBe(4);
      expect(asked).toEqual([
        ...['take internal a', 'take external x', 'take internal b', 'delete internal b', 'delete external x'],
      ]);
    }));

  it('shows what others do to the image when somebody looks, and lets who has it open read on', () =>
    withAttached({}, async ({ directory, disk, fill }) => {
      const changes: string[] = [];
      disk.onChange((change) => changes.push(change));
      await fill(1);
      await runOk('qemu-img', ['snapshot', '-c', 'theirs', join(directory, 'vm1.qcow2')]);
      expect(listed(disk)).toEqual([]);
      await disk.refresh('checkpoints');
      expect(listed(disk)).toEqual(['internal theirs']);
      expect(changes).toContain('checkpoints');
      const [theirs] = disk.checkpoints();
      const open = disk.openCheckpoint(theirs as never);
      await fill(2);
      await disk.refresh('contents');
      await disk.refresh('contents');
      expect(disk.checkpoints()).toEqual([theirs]);
      expect(first(open)).toBe(1);
      changes.length = 0;
      await disk.refresh('checkpoints');
      expect(changes).toEqual([]);
    }));

  it('lets the views of other threads follow before the files are closed', () =>
    withAttached({}, async ({ disk, fill }) => {
      const live = disk.openLive();
      const before = live.shared;
      expect(live.shared).toBe(before);
      let told = 0;
      disk.onLayers(async () => {
        told++;
        expect(live.shared).not.toBe(before);
        expect(live.shared.id).toBe(before.id);
      });
      await fill(1);
      await disk.refresh('contents');
      expect(told).toBe(1);
    }));

  it('fails with ETIMEDOUT where the image does not show what the guest was asked for', () =>
    withAttached({ take: async () => {} }, async ({ disk }) => {
      await expect(disk.takeCheckpoint('a')).rejects.toMatchObject({ errno: 'ETIMEDOUT' });
      expect(disk.operation()).toBe(undefined);
    }));

  it('refuses to have an overlay merged that images of others are built on', () =>
    withAttached({}, async ({ directory, disk, asked }) => {
      const x = await disk.takeCheckpoint('x', { kind: 'external' });
      const clone = join(directory, 'clone.img');
      await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', disk.imagePath, clone]);
      await expect(disk.deleteCheckpoint(x)).rejects.toMatchObject({
        errno: 'EBUSY',
        message: expect.stringContaining(clone),
      });
      expect(asked).toEqual(['take external x']);
    }));

  it('is never written', () =>
    withAttached({}, async ({ directory, disk, fill }) => {
      await fill(1);
      const a = await disk.takeCheckpoint('a');
      const path = join(directory, 'vm1.qcow2');
      const now = () => ({
        hash: createHash('sha256').update(readFileSync(path)).digest('hex'),
        mtimeMs: statSync(path).mtimeMs,
      });
      const before = now();
      for (const refused of [
        () => disk.freeze('internal', 'b'),
        () => disk.holdWrites(),
        () => disk.renameCheckpoint(a, 'b'),
        () => disk.rollback(a),
        () => disk.resize(32 * MIB, { shrink: false }),
        () => disk.compact(),
      ]) {
        await expect(refused()).rejects.toMatchObject({ errno: 'EROFS' });
      }
      expect(() => disk.openLive().contents.write(new Uint8Array(1), 0, 1, 0)).toThrow(/cannot be written/);
      await disk.close();
      expect(now()).toEqual(before);
    }));
});
