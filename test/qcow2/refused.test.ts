/** Snapshots that the format cannot hold are refused before anything is touched. */
import { describe, expect, it } from 'vitest';
import type { FormatOptions } from '../../src/qcow2/create.ts';
import { closeSession, formatted, openSession, qemuCheck } from './model.ts';
import { perform } from './script.ts';

const page = new Uint8Array(2000).fill(7);

async function expectRefused(options: FormatOptions, taken: number): Promise<void> {
  const storage = formatted(options);
  const first = openSession(storage);
  await perform(first, { do: 'write', at: 700, bytes: page });
  for (let index = 0; index < taken; index++) await perform(first, { do: 'take', name: `s${index}` });
  closeSession(first);
  const before = storage.bytes();

  const second = openSession(storage);
  await expect(perform(second, { do: 'take', name: 'one too many' })).rejects.toThrow(
    expect.objectContaining({ errno: 'ENOTSUP' }),
  );
  expect(second.list.entries).toHaveLength(taken);
  closeSession(second);
  expect(Buffer.compare(storage.bytes(), before)).toBe(0);
  qemuCheck(storage);
}

describe('a snapshot is refused, and the file stays as it was to the byte,', () => {
  it('with refcounts of 1 bit', async () => {
    await expectRefused({ size: 50_176, clusterBytes: 512, refcountBits: 1 }, 0);
  });

  it('when refcounts of 2 bits are at their ceiling', async () => {
    await expectRefused({ size: 50_176, clusterBytes: 512, refcountBits: 2 }, 2);
  });

  it('when refcounts of 4 bits are at their ceiling', async () => {
    await expectRefused({ size: 300_032, clusterBytes: 4096, refcountBits: 4 }, 14);
  });
});
