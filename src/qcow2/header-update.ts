/**
 * Changes of the header in place. Each is one write of adjacent fields inside one 512-byte sector: after a crash the
 * header has all of it or nothing. The caller places the barriers.
 */
import type { Storage } from '../storage/storage.ts';
import { decodeHeader, encodeHeaderCluster, type Header, headerAt, readHeader } from './header.ts';
import { encodeExtensions, extensionsBytes, extensionType, type HeaderExtension } from './header-extensions.ts';

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

/** What an image stands on: `file` as it is to be recorded, relative to the image's folder. Undefined: nothing. */
export type RecordedBacking = { readonly file: string; readonly format: 'qcow2' | 'raw' } | undefined;

/**
 * Let an image stand on another backing file. The new name goes where the old one is not, durably, before one write
 * inside the first sector switches to it. Durable when it returns. Nobody else may write the header meanwhile.
 * @throws FsError EINVAL if the name is longer than 1023 bytes, or the first cluster has no room for it
 */
export function writeBacking(storage: Storage, backing: RecordedBacking): void {
  const header = readHeader(storage);
  const changes = { backingFile: backing?.file, backingFormat: backing?.format };
  const { extensions } = decodedAgain(encodeHeaderCluster(header, changes), storage);
  const name = new TextEncoder().encode(backing?.file ?? '');
  const areaEnd = header.headerLength + extensionsBytes(header.extensions);
  const head = new Uint8Array(Math.min(SECTOR_BYTES, header.clusterBytes));
  storage.read(head, 0, head.length, 0);
  const view = new DataView(head.buffer);
  const oldAt = Number(view.getBigUint64(headerAt.backingFileOffset));
  const oldEnd = oldAt + view.getUint32(headerAt.backingFileBytes);
  const at = [areaEnd, areaEnd + NAME_ROOM].find(
    (start) => start + name.length <= header.clusterBytes && (start >= oldEnd || start + name.length <= oldAt),
  );
  const format = encodedAt(header.headerLength, extensions, extensionType.BACKING_FORMAT);
  const sameLayout = extensionsBytes(extensions) === extensionsBytes(header.extensions);
  const formatFits = format === undefined || format.at + format.bytes.length <= head.length;
  if (backing !== undefined && at !== undefined && sameLayout && formatFits) {
    storage.write(name, 0, name.length, at);
    storage.flush();
    view.setBigUint64(headerAt.backingFileOffset, BigInt(at));
    view.setUint32(headerAt.backingFileBytes, name.length);
    if (format !== undefined) head.set(format.bytes, format.at);
    const end = format === undefined ? headerAt.clusterBits : format.at + format.bytes.length;
    storage.write(head, headerAt.backingFileOffset, end - headerAt.backingFileOffset, headerAt.backingFileOffset);
  } else if (backing === undefined) {
    // The format stays behind: without a name it says nothing.
    head.fill(0, headerAt.backingFileOffset, headerAt.clusterBits);
    storage.write(
      head,
      headerAt.backingFileOffset,
      headerAt.clusterBits - headerAt.backingFileOffset,
      headerAt.backingFileOffset,
    );
  } else {
    const cluster = encodeHeaderCluster(header, changes);
    storage.write(cluster, 0, cluster.length, 0);
  }
  storage.flush();
}

const SECTOR_BYTES = 512;
/** Two names of the greatest length find place behind each other. */
const NAME_ROOM = 1024;

const decodedAgain = (cluster: Uint8Array, storage: Storage): Header => decodeHeader(cluster, storage.size());

/** One extension as it stands in the file, and where. */
function encodedAt(
  start: number,
  extensions: readonly HeaderExtension[],
  type: number,
): { readonly at: number; readonly bytes: Uint8Array } | undefined {
  let at = start;
  for (const extension of extensions) {
    const bytes = encodeExtensions([extension]).subarray(0, extensionsBytes([extension]) - extensionsBytes([]));
    if (extension.type === type) return { at, bytes };
    at += bytes.length;
  }
  return undefined;
}
