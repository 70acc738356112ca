/**
 * Changes of the header in place. Each is one write of adjacent fields inside one 512-byte sector: after a crash the
 * header has all of it or nothing. The caller places the barriers.
 */
import type { Storage } from '../storage/storage.ts';
import { headerAt } from './header.ts';

function put(storage: Storage, at: number, bytes: number, fill: (view: DataView) => void): void {
  const target = new Uint8Array(bytes);
  fill(new DataView(target.buffer));
  storage.write(target, 0, bytes, at);
}

export function writeRefcountTablePosition(storage: Storage, offset: number, clusters: number): void {
  put(storage, headerAt.refcountTableOffset, 12, (view) => {
    view.setBigUint64(0, BigInt(offset));
    view.setUint32(8, clusters);
  });
}

export function writeSnapshotTablePosition(storage: Storage, count: number, offset: number): void {
  put(storage, headerAt.snapshotCount, 12, (view) => {
    view.setUint32(0, count);
    view.setBigUint64(4, BigInt(offset));
  });
}

/** Virtual size and L1 table at once; the encryption method between them is 0 in every image that is opened. */
export function writeDisk(storage: Storage, virtualSize: number, l1Entries: number, l1TableOffset: number): void {
  put(storage, headerAt.size, 24, (view) => {
    view.setBigUint64(0, BigInt(virtualSize));
    view.setUint32(12, l1Entries);
    view.setBigUint64(16, BigInt(l1TableOffset));
  });
}
