/**
 * The mark of a session that has not ended: whoever opens the image next counts the refcounts anew. Version 3 has the
 * dirty bit for that. Version 2 has nothing; there a header extension of our own stands in, which other programs keep
 * and do not look at. The write order keeps version 2 images free of corruption without it; it only tells of leaks.
 */
import { FsError } from '../errors.ts';
import type { Storage } from '../storage/storage.ts';
import { encodeHeaderCluster, type Header, headerAt, incompatible, readHeader } from './header.ts';
import { extensionType } from './header-extensions.ts';

export const isMarked = (header: Header): boolean =>
  header.version >= 3
    ? (header.incompatible & incompatible.DIRTY) !== 0n
    : header.extensions.some(({ type }) => type === extensionType.SESSION);

/** The caller makes it durable, also where the mark was there already. @throws FsError ENOSPC; it is not there then */
export function mark(storage: Storage): void {
  const header = readHeader(storage);
  if (isMarked(header)) return;
  if (header.version >= 3) writeIncompatible(storage, header.incompatible | incompatible.DIRTY);
  else
    writeExtensions(storage, header, [...header.extensions, { type: extensionType.SESSION, data: new Uint8Array() }]);
}

/** Durable when it returns. */
export function unmark(storage: Storage): void {
  const header = readHeader(storage);
  if (!isMarked(header)) return;
  if (header.version >= 3) writeIncompatible(storage, header.incompatible & ~incompatible.DIRTY);
  else
    writeExtensions(
      storage,
      header,
      header.extensions.filter(({ type }) => type !== extensionType.SESSION),
    );
  storage.flush();
}

function writeIncompatible(storage: Storage, bits: bigint): void {
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setBigUint64(0, bits);
  storage.write(bytes, 0, 8, headerAt.incompatible);
}

function writeExtensions(storage: Storage, header: Header, extensions: Header['extensions']): void {
  try {
    const cluster = encodeHeaderCluster(header, { extensions });
    storage.write(cluster, 0, cluster.length, 0);
  } catch (error) {
    // No room in the first cluster (512 bytes and a long backing name): then a crash may leave leaks unnoticed.
    if (!(error instanceof FsError && error.errno === 'EINVAL')) throw error;
  }
}
