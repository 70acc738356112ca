import { mkdtempSync, readFileSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { MemoryStorage, PAGE_BYTES } from './memory-storage.ts';
import { storageContract } from './storage-contract.ts';

storageContract('MemoryStorage', (action) => action(new MemoryStorage()));

describe('a file in memory', () => {
  it('and its copy go separate ways, whichever is written', () => {
    const one = MemoryStorage.from(Uint8Array.of(1, 2, 3));
    const copy = one.copy();
    one.write(Uint8Array.of(8), 0, 1, 0);
    copy.write(Uint8Array.of(9), 0, 1, 1);
    one.truncate(2);
    expect([...one.bytes()]).toEqual([8, 2]);
    expect([...copy.bytes()]).toEqual([1, 9, 3]);
    const third = copy.copy();
    copy.punch(0, 2);
    expect([...third.bytes()]).toEqual([1, 9, 3]);
  });

  it('goes to a host file and comes back, holes and all', () => {
    const folder = mkdtempSync(join(tmpdir(), 'vdskfs-memory-'));
    const path = join(folder, 'a');
    const storage = MemoryStorage.from(Uint8Array.of(1, 2));
    storage.truncate(100 * PAGE_BYTES + 5);
    storage.save(path);
    expect(statSync(path).size).toBe(100 * PAGE_BYTES + 5);
    expect(Buffer.compare(readFileSync(path), storage.bytes())).toBe(0);
    const back = MemoryStorage.load(path);
    expect([back.size(), back.allocatedBytes()]).toEqual([100 * PAGE_BYTES + 5, PAGE_BYTES]);
    expect(Buffer.compare(back.bytes(), storage.bytes())).toBe(0);
    rmSync(folder, { recursive: true });
  });

  it('can be read-only, and unable to punch', () => {
    expect(() => new MemoryStorage({ readOnly: true }).truncate(1)).toThrow(
      expect.objectContaining({ errno: 'EBADF' }),
    );
    const storage = MemoryStorage.from(Uint8Array.of(1), { punches: false });
    expect(storage.punch(0, 1)).toBe(false);
    expect([...storage.bytes()]).toEqual([1]);
  });
});
