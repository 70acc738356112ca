/** Whether two disks hold the same bytes: data is read where either has any. */
import { Buffer } from 'node:buffer';
import { setImmediate as giveWay } from 'node:timers/promises';
import type { Source } from './copy-out.ts';
import type { Work } from './disk.ts';

const PIECE_BYTES = 2 ** 20;

/** Disks of different sizes are different. @throws what reading throws, the signal's reason */
export async function haveSameContents(a: Source, b: Source, { progress, signal }: Work = {}): Promise<boolean> {
  const size = a.size();
  if (b.size() !== size) return false;
  const [bytesOfA, bytesOfB] = [new Uint8Array(PIECE_BYTES), new Uint8Array(PIECE_BYTES)];
  for (let position = 0; position < size; ) {
    const next = [a, b].map((source) => source.nextData(position)).filter((found) => found >= 0);
    if (next.length === 0) return true;
    const start = Math.min(...next);
    const length = Math.min(PIECE_BYTES, size - start);
    a.read(bytesOfA, 0, length, start);
    b.read(bytesOfB, 0, length, start);
    if (Buffer.compare(bytesOfA.subarray(0, length), bytesOfB.subarray(0, length)) !== 0) return false;
    position = start + length;
    progress?.(position / size);
    await giveWay();
    signal?.throwIfAborted();
  }
  return true;
}
