import { rebuildRefcounts } from '../qcow2/check.ts';
import { type Compaction, type CompactOptions, compactImage } from '../qcow2/compact/compact.ts';
import { readHeader } from '../qcow2/header.ts';
import { closeImage } from '../qcow2/open-image.ts';
import { isMarked, unmark } from '../qcow2/session-mark.ts';
import { lockImage } from '../storage/image-lock.ts';
import { type Layer, loadImage } from './layer.ts';

/**
 * Compact a layer that others stand on: its contents stay, but everybody who has it open knows where in its file they
 * are. There must be no view of it, and those above must `follow` it afterwards.
 * @throws FsError EBUSY if another process reads it, ENOSPC, EIO
 */
export async function compactFrozen(layer: Layer, cacheBytes: number, options: CompactOptions): Promise<Compaction> {
  const { file, path, qcow2 } = layer;
  if (qcow2 === undefined || file.readOnly) return { finished: true, clustersMoved: 0 };
  const { snapshots } = qcow2;
  lockImage(file.fd, path, 'write', 'read');
  try {
    const header = readHeader(file);
    if (isMarked(header)) {
      rebuildRefcounts(file, header);
      unmark(file);
    }
    const { image } = loadImage(layer, readHeader(file), snapshots, { writable: true, cacheBytes });
    try {
      return await compactImage(image, snapshots, options);
    } finally {
      closeImage(image);
    }
  } finally {
    layer.reopen(loadImage(layer, readHeader(file), snapshots, { writable: false, cacheBytes }));
    lockImage(file.fd, path, 'read', 'write');
  }
}
