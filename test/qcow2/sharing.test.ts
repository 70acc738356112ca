import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { zeroRange } from '../../src/qcow2/discard.ts';
import { readRange } from '../../src/qcow2/read.ts';
import { deleteSnapshot, readSnapshotL1 } from '../../src/qcow2/snapshots.ts';
import { takeSnapshot } from '../../src/qcow2/take-snapshot.ts';
import { writeRange } from '../../src/qcow2/write.ts';
import { HostFile } from '../../src/storage/host-file.ts';
import type { MemoryStorage } from '../storage/memory-storage.ts';
import { closeSession, formatted, openSession, qemuCheck, type Session } from './model.ts';

/** One L2 table of 512-byte clusters. */
const SPAN = 32_768;
const TABLES = 40;
const SIZE = TABLES * SPAN;

/** A disk all of which is in use, and what it holds. */
function filled(version: 2 | 3 = 3): { storage: MemoryStorage; session: Session; live: Uint8Array } {
  const storage = formatted({ size: SIZE, clusterBytes: 512, version });
  const session = openSession(storage);
  const live = new Uint8Array(SIZE).map((_, at) => 1 + (at % 251));
  writeRange(session.image, live, 0, SIZE, 0);
  return { storage, session, live };
}

function expectContents({ image, list }: Session, live: Uint8Array, saved: ReadonlyMap<string, Uint8Array>): void {
  const got = new Uint8Array(SIZE);
  readRange(image, undefined, got, 0, SIZE, 0);
  expect(Buffer.compare(got, live)).toBe(0);
  for (const entry of list.entries) {
    readRange(image, readSnapshotL1(image, entry), got, 0, SIZE, 0);
    expect(Buffer.compare(got, saved.get(entry.name) as Uint8Array)).toBe(0);
  }
}

/** A writer that, whenever it is called, changes the table whose turn is next, one that had its turn, and the last one. */
function writer({ image }: Session, live: Uint8Array): (done: number) => void {
  let calls = 0;
  return (done) => {
    const next = Math.min(TABLES - 1, Math.floor(done * TABLES) + 1);
    for (const table of [next, Math.max(0, next - 3), TABLES - 1]) {
      const at = table * SPAN + (calls % 60) * 512;
      if (calls++ % 3 === 0) {
        if (!zeroRange(image, at, 512, 'free')) continue;
        live.fill(0, at, at + 512);
      } else {
        const bytes = new Uint8Array(700).fill(calls);
        if (!writeRange(image, bytes, 0, 700, at)) continue;
        live.set(bytes, at);
      }
    }
  };
}

describe('a mapping shared table by table', () => {
  it.each([2, 3] as const)(
    'keeps what the snapshot held, whatever is written meanwhile (version %i)',
    async (version) => {
      const { storage, session, live } = filled(version);
      const { image, list } = session;
      const saved = new Map<string, Uint8Array>();
      for (const [index, name] of ['a', 'b', 'c'].entries()) {
        saved.set(name, live.slice());
        const write = writer(session, live);
        await takeSnapshot(image, list, { name, timeMs: index }, write);
        expectContents(session, live, saved);
      }
      for (const name of ['b', 'a', 'c']) {
        const entry = list.entries.find((one) => one.name === name);
        await deleteSnapshot(image, list, entry as NonNullable<typeof entry>, writer(session, live));
        expectContents(session, live, saved);
      }
      closeSession(session);
      // No leak, and COPIED wherever a cluster has one reference only.
      qemuCheck(storage);
    },
  );

  it('lets writers go on while it takes its turns', async () => {
    const { session, live } = filled();
    let written = 0;
    await takeSnapshot(session.image, session.list, { name: 'a', timeMs: 0 }, () => {
      if (writeRange(session.image, Uint8Array.of(7), 0, 1, 0)) written++;
    });
    live[0] = 7;
    expect(written).toBeGreaterThan(TABLES / 2);
    const got = new Uint8Array(1);
    readRange(session.image, undefined, got, 0, 1, 0);
    expect(got[0]).toBe(7);
    closeSession(session);
  });
});

describe('deleting a snapshot', () => {
  it('gives back tables that have more slices than the cache', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'vdskfs-sharing-'));
    try {
      const path = join(folder, 'disk.qcow2');
      const options = ['-q', '-f', 'qcow2', '-o', 'preallocation=metadata,cluster_size=512k'];
      execFileSync('qemu-img', ['create', ...options, path, '32G']);
      using file = HostFile.open(path, { readOnly: false });
      const session = openSession(file);
      expect(512 * 1024).toBeGreaterThan(session.image.l2.slots * session.image.l2.sliceBytes);
      const { image, list } = session;
      const entry = await takeSnapshot(image, list, { name: 's', timeMs: 0 }, () => {});
      await deleteSnapshot(image, list, entry, () => {});
      closeSession(session);
      execFileSync('qemu-img', ['check', '-q', path], { stdio: 'pipe' });
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  });
});
