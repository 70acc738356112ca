import { describe, expect, it, vi } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { punchFreed } from '../../src/qcow2/give-back.ts';
import { closeSession, formatted, openSession } from './model.ts';

const CLUSTER = 65_536;

/** An image whose file has data in clusters 20 and 24 to 25, and nothing else in 20 to 39. */
function fixture() {
  const storage = formatted({ size: 64 * CLUSTER, clusterBytes: CLUSTER });
  const session = openSession(storage);
  storage.truncate(40 * CLUSTER);
  for (const cluster of [20, 24, 25]) storage.write(new Uint8Array(CLUSTER).fill(1), 0, CLUSTER, cluster * CLUSTER);
  const punched: number[][] = [];
  const punch = storage.punch.bind(storage);
  vi.spyOn(storage, 'punch').mockImplementation((position, length) => {
    punched.push([position / CLUSTER, length / CLUSTER]);
    return punch(position, length);
  });
  return { storage, session, punched };
}

const clusters = (first: number, count = 1) => ({ first, count });

describe('space given back to the host', () => {
  it('is punched where there is data, and left alone where there is a hole already', () => {
    const { session, punched } = fixture();
    punchFreed(session.image, [
      clusters(20),
      clusters(21, 3),
      clusters(22),
      clusters(23, 2),
      clusters(26, 4),
      clusters(25),
    ]);
    expect(punched).toEqual([
      [20, 1],
      [23, 2],
      [25, 1],
    ]);
    closeSession(session);
  });

  it('is punched everywhere if the host does not tell where its holes are', () => {
    const { storage, session, punched } = fixture();
    vi.spyOn(storage, 'nextData').mockImplementation(() => {
      throw new FsError('EIO', 'no holes today');
    });
    punchFreed(session.image, [clusters(21), clusters(24)]);
    expect(punched).toEqual([
      [21, 1],
      [24, 1],
    ]);
    closeSession(session);
  });
});
