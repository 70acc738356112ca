import { describe, expect, it } from 'vitest';
import { zeroRange } from '../../src/qcow2/discard.ts';
import { tidy } from '../../src/qcow2/flush.ts';
import { UNLINKED_CAPACITY, word } from '../../src/qcow2/image.ts';
import { readRange } from '../../src/qcow2/read.ts';
import { takeSnapshot } from '../../src/qcow2/take-snapshot.ts';
import { writeRange } from '../../src/qcow2/write.ts';
import { closeSession, formatted, openSession, qemuCheck } from './model.ts';

const MIB = 2 ** 20;

describe('a change of more tables than fit into the cache', () => {
  it.each([
    ['write', 16 * MIB],
    ['write', 4 * MIB],
  ])('is done in steps: %s of %i bytes', (_name, length) => {
    const storage = formatted({ size: 32 * MIB, clusterBytes: 512 });
    const session = openSession(storage);
    const bytes = new Uint8Array(length).map((_, index) => 1 + (index % 251));
    expect(writeRange(session.image, bytes, 0, length, 12_345)).toBe(true);
    const found = new Uint8Array(length);
    readRange(session.image, undefined, found, 0, length, 12_345);
    expect(Buffer.compare(found, bytes)).toBe(0);
    closeSession(session);
    qemuCheck(storage);
  });

  it('is done in steps: copy on write, then a discard, each unlinking more clusters than are noted at a time', async () => {
    const storage = formatted({ size: 32 * MIB, clusterBytes: 512 });
    const session = openSession(storage);
    const bytes = new Uint8Array(12 * MIB).fill(1);
    expect(writeRange(session.image, bytes, 0, bytes.length, 0)).toBe(true);
    await takeSnapshot(session.image, session.list, { name: 's', timeMs: 0 }, () => {});
    // Every second cluster, so that no two can be noted as one.
    for (let at = 0; at < bytes.length; at += 1024) writeRange(session.image, bytes, 0, 512, at);
    expect(writeRange(session.image, bytes, 0, bytes.length, 0)).toBe(true);
    expect(zeroRange(session.image, 0, 32 * MIB, 'free')).toBe(true);
    closeSession(session);
    qemuCheck(storage);
  });
});

describe('what writes leave to be flushed', () => {
  it('waits for tidy, so that no client waits for it, until the list of unlinked clusters is half full', async () => {
    const storage = formatted({ size: 32 * MIB, clusterBytes: 512 });
    const session = openSession(storage, storage, undefined, 4 * MIB);
    const { image } = session;
    const clusters = (UNLINKED_CAPACITY * 3) / 2;
    const bytes = new Uint8Array(clusters * 512).fill(1);
    expect(writeRange(image, bytes, 0, bytes.length, 0)).toBe(true);
    await takeSnapshot(image, session.list, { name: 's', timeMs: 0 }, () => {});
    const unlinked = () => image.words[word.UNLINKED_COUNT] as number;
    /** Copies on write of every second cluster, so that no two can be noted as one. */
    const copy = (from: number, to: number): void => {
      for (let cluster = from; cluster < to; cluster += 2) writeRange(image, bytes, 0, 512, cluster * 512);
    };

    copy(0, UNLINKED_CAPACITY / 8);
    tidy(image);
    expect(unlinked()).toBeGreaterThanOrEqual(UNLINKED_CAPACITY / 16);
    copy(UNLINKED_CAPACITY / 8, UNLINKED_CAPACITY / 2);
    expect(unlinked()).toBeGreaterThanOrEqual(UNLINKED_CAPACITY / 4);
    image.words[word.FLUSHING] = 1; // another thread is at it
    tidy(image);
    expect(unlinked()).toBeGreaterThanOrEqual(UNLINKED_CAPACITY / 4);
    image.words[word.FLUSHING] = 0;
    tidy(image);
    expect(unlinked()).toBe(0);
    copy(UNLINKED_CAPACITY / 2, clusters);
    expect(unlinked()).toBeLessThanOrEqual(UNLINKED_CAPACITY / 2 + 1);
    closeSession(session);
    qemuCheck(storage);
  });
});
