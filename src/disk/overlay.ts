/** Making an overlay, and going on in it. */
import { dirname, relative } from 'node:path';
import { FsError } from '../errors.ts';
import { rebuildRefcounts } from '../qcow2/check.ts';
import { createImage } from '../qcow2/create.ts';
import { dataClusters } from '../qcow2/data-clusters.ts';
import { closeGate, openGate } from '../qcow2/gate.ts';
import { readHeader } from '../qcow2/header.ts';
import { writeBacking } from '../qcow2/header-update.ts';
import { number, word } from '../qcow2/image.ts';
import { closeImage } from '../qcow2/open-image.ts';
import { l2Tables } from '../qcow2/references.ts';
import { isMarked, unmark } from '../qcow2/session-mark.ts';
import { HostFile } from '../storage/host-file.ts';
import { lockImage } from '../storage/image-lock.ts';
import { Layer, type LayerImage, loadFrozen, loadImage } from './layer.ts';
import { placeNew, removeOverlayFiles, temporaryPath, unlinkDurably } from './overlay-files.ts';
import { encodeMark, type OverlayMark, overlaysElsewhere, rememberOverlays } from './overlay-mark.ts';

/** Smaller ones have no room in the first cluster for the marks and two names of backing files. */
const LEAST_CLUSTER_BYTES = 4096;
const DEFAULT_CLUSTER_BYTES = 65536;

/**
 * The name of a backing file as an image records it. A colon would make the part before it a protocol to QEMU.
 * Both paths without links.
 */
export function recordedName(imagePath: string, backingPath: string): string {
  const name = relative(dirname(imagePath), backingPath);
  return /^[^/]*:/.test(name) ? `./${name}` : name;
}

/**
 * A new overlay over a layer, empty, open for writing and locked. The file is durable; it never replaces one.
 * @throws FsError EEXIST, ENOSPC, …; nothing is left behind then
 */
export function createOverlay(
  path: string,
  below: Layer,
  options: { readonly mark: OverlayMark; readonly size: number; readonly cacheBytes: number },
): Layer {
  const clusterBytes = below.qcow2?.header.clusterBytes ?? DEFAULT_CLUSTER_BYTES;
  const temporary = temporaryPath(dirname(path));
  createImage(temporary, {
    size: options.size,
    // As below: then a merge moves whole clusters, in either direction.
    clusterBytes: Math.max(clusterBytes, LEAST_CLUSTER_BYTES),
    backing: { file: recordedName(path, below.path), format: below.format },
    extensions: [encodeMark(options.mark)],
  });
  try {
    placeNew(temporary, path);
  } catch (error) {
    unlinkDurably(temporary);
    throw error;
  }
  let file: HostFile | undefined;
  try {
    file = HostFile.open(path, { readOnly: false });
    lockImage(file.fd, path, 'write');
    const header = readHeader(file);
    const snapshots = { entries: [], tableOffset: 0, tableBytes: 0 };
    const { cacheBytes } = options;
    const layer = new Layer(
      { path, file },
      loadImage({ path, file }, header, snapshots, { writable: true, cacheBytes }),
      below,
    );
    layer.image.numbers[number.DATA_CLUSTERS] = 0;
    rememberElsewhere(below, path);
    return layer;
  } catch (error) {
    file?.[Symbol.dispose]();
    removeOverlayFiles(path);
    throw error;
  }
}

/** An overlay in another folder than the image below would not be found from there. */
export function rememberElsewhere(below: Layer, path: string): void {
  if (below.qcow2 === undefined || dirname(below.path) === dirname(path) || below.file.readOnly) return;
  if (overlaysElsewhere(readHeader(below.file)).includes(path)) return;
  const { image } = below.qcow2;
  // Writers mark the session in the same header.
  if (image.geometry.writable) image.lock();
  try {
    rememberOverlays(below.file, [...new Set([...overlaysElsewhere(readHeader(below.file)), path])]);
  } finally {
    if (image.geometry.writable) image.unlock();
  }
}

/** The overlay at `path` is about to go, or to be found under another name that is remembered already. Durable. */
export function forgetElsewhere(below: Layer, path: string): void {
  if (below.qcow2 === undefined || below.file.readOnly) return;
  const known = overlaysElsewhere(readHeader(below.file));
  if (!known.includes(path)) return;
  const { image } = below.qcow2;
  if (image.geometry.writable) image.lock();
  try {
    rememberOverlays(
      below.file,
      known.filter((other) => other !== path),
    );
  } finally {
    if (image.geometry.writable) image.unlock();
  }
}

/** The same file, from now on to be written. Those above it must follow. @throws FsError EBUSY, EROFS, EIO */
export function reopenForWriting(layer: Layer, cacheBytes: number): void {
  const { file, path, qcow2 } = layer;
  if (qcow2 === undefined || file.readOnly) throw new FsError('EROFS', `${path} may not be written on the host`);
  lockImage(file.fd, path, 'write', 'read');
  try {
    let header = readHeader(file);
    if (isMarked(header)) {
      rebuildRefcounts(file, header);
      unmark(file);
      header = readHeader(file);
    }
    const opened = loadImage(layer, header, qcow2.snapshots, { writable: true, cacheBytes });
    opened.image.numbers[number.DATA_CLUSTERS] = dataClusters(opened.image);
    layer.reopen(opened);
  } catch (error) {
    lockImage(file.fd, path, 'read', 'write');
    throw error;
  }
}

/** Nothing was ever written to the overlay. */
export function isEmpty({ image }: Layer): boolean {
  return l2Tables(image.l1, image.numbers[number.L1_ENTRIES] as number).every((table) => table === 0);
}

/** Let a layer stand on another one, that shows the same; its file says so, durably, when it returns. */
export function standOn(layer: Layer, below: Layer | undefined): void {
  if (below !== undefined) rememberElsewhere(below, layer.path);
  const { image } = layer;
  const { writable } = image.geometry;
  // Writers mark the session in the same header.
  if (writable) image.lock();
  try {
    writeBacking(
      layer.file,
      below === undefined ? undefined : { file: recordedName(layer.path, below.path), format: below.format },
    );
  } finally {
    if (writable) image.unlock();
  }
  layer.follow(below);
}

/**
 * Let the disk go on in `next`: writes that run end in the layer they belong to, those that come wait until all views
 * follow. `commit` makes the files say so, while nobody writes; `activate` the tree. Resolves when no thread uses the
 * layers as they were.
 * @throws FsError EIO if the layer before could not be made durable, or what `commit` throws; the disk is where it was then
 */
export async function switchLayer(
  before: Layer,
  next: Layer,
  commit: () => void | Promise<void>,
  activate: () => void,
  relinked: () => Promise<void>,
): Promise<void> {
  const { image } = before;
  image.checkUsable();
  closeGate(image);
  let closed = 1;
  let frozen: LayerImage;
  try {
    // Closes the gate once more, and for good: nobody writes this layer any more.
    closeImage(image);
    closed++;
    image.checkUsable();
    // What does not change any more is read together with the others below it.
    frozen = loadFrozen(before);
    await commit();
  } catch (error) {
    for (; closed > 0; closed--) openGate(image);
    throw error;
  }
  closeGate(next.image);
  // Whoever holds the writes of the disk holds those of the next layer from now on.
  for (let held = (image.words[word.GATE] as number) - closed; held > 0; held--) closeGate(next.image);
  lockImage(before.file.fd, before.path, 'read', 'write');
  before.reopen(frozen);
  next.follow(next.below);
  activate();
  const done = relinked();
  openGate(next.image);
  for (const goOn of image.gateWaiters.splice(0)) goOn();
  await done;
}
