/** Layers that do not change are read as one, in every thread, also when the disk goes on in another image. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { attachContents } from '../../src/disk/attach-contents.ts';
import type { SharedChain } from '../../src/disk/chain.ts';
import type { Contents, Disk, SharedContents } from '../../src/disk/disk.ts';
import { openDisk } from '../../src/disk/open-disk.ts';

const SIZE = 2 ** 20;
const LAYERS = 5;

let folder = '';
let disk: Disk;

const run = (command: string, ...args: string[]) => execFileSync(command, args, { cwd: folder, stdio: 'pipe' });

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'vdskfs-run-'));
  for (let layer = 0; layer < LAYERS; layer++) {
    const below = layer === 0 ? [] : ['-b', `l${layer - 1}`, '-F', layer === 1 ? 'raw' : 'qcow2'];
    const format = layer === 0 ? 'raw' : 'qcow2';
    run('qemu-img', 'create', '-q', '-f', format, ...below, `l${layer}`, String(SIZE));
    run('qemu-io', '-f', format, '-c', `write -P ${layer + 1} ${layer * 150}k 200k`, `l${layer}`);
  }
  run('qemu-img', 'convert', '-O', 'raw', `l${LAYERS - 1}`, 'all');
  disk = await openDisk(join(folder, `l${LAYERS - 1}`), { readOnly: false });
});

afterEach(async () => {
  await disk.close();
  rmSync(folder, { recursive: true });
});

const read = (contents: Contents): Uint8Array => {
  const bytes = new Uint8Array(contents.size());
  contents.read(bytes, 0, bytes.length, 0);
  return bytes;
};

/** Lengths of the runs, by the layer at which they begin, from the top. */
const runs = (shared: SharedContents): [number, number][] =>
  (shared as unknown as { chain: SharedChain }).chain.flatMap((layer, index): [number, number][] =>
    layer.run === undefined ? [] : [[index, layer.run.count]],
  );

describe('a chain', () => {
  it('has one run below its top, which reads as qemu-img reads it', () => {
    const { contents, shared } = disk.openLive();
    const expected = new Uint8Array(readFileSync(join(folder, 'all')));
    expect(runs(shared)).toEqual([[1, LAYERS - 1]]);
    for (const one of [contents, attachContents(shared), attachContents(structuredClone(shared))]) {
      expect(Buffer.compare(read(one), expected)).toBe(0);
    }
  });

  it('has a longer one when the disk goes on in an overlay', async () => {
    const { contents, shared } = disk.openLive();
    const before = attachContents(shared);
    const expected = new Uint8Array(readFileSync(join(folder, 'all')));
    const byte = Uint8Array.of(77);
    contents.write(byte, 0, 1, 1000);
    expected[1000] = 77;
    const checkpoint = await disk.takeCheckpoint('x', { kind: 'external' });
    contents.write(byte, 0, 1, 2000);
    const after = disk.openLive();
    expect(runs(after.shared)).toEqual([[1, LAYERS]]);
    using frozen = disk.openCheckpoint(checkpoint);
    for (const one of [frozen.contents, attachContents(frozen.shared), before]) {
      expect(Buffer.compare(read(one), expected)).toBe(0);
    }
    expected[2000] = 77;
    for (const one of [contents, after.contents, attachContents(after.shared)]) {
      expect(Buffer.compare(read(one), expected)).toBe(0);
    }
  });
});
