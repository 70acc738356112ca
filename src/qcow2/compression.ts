/**
 * Compressed clusters (qcow2 specification, "Compressed Clusters Descriptor"). The descriptor counts sectors, not
 * bytes: what follows the compressed data up to the last sector's end is padding, or another cluster's data.
 */
import * as zlib from 'node:zlib';
import { Decompress } from 'fzstd';
import { CorruptImage } from '../errors.ts';
import type { CompressionType } from './header.ts';

/** The window that QEMU's inflate has; what is written must not need more. */
const WRITE_WINDOW_BITS = 12;
/** Other writers may have used more: reading allows deflate's maximum. */
const READ_WINDOW_BITS = 15;
/** zlib's least output chunk. */
const MIN_CHUNK_BYTES = 64;

/**
 * Fill `target` (one cluster) from the compressed data in `source[0, sourceBytes)`, which may have padding behind it,
 * and may be cut by the end of the file within its padding.
 * @throws CorruptImage if the data is damaged, or makes less or more than a cluster
 */
export function decompressCluster(
  type: CompressionType,
  source: Uint8Array,
  sourceBytes: number,
  target: Uint8Array,
): void {
  const data = source.subarray(0, sourceBytes);
  if (type === 'deflate') inflate(data, target);
  else unzstd(data, target);
}

/**
 * The deflate stream of one cluster, readable by QEMU.
 * @returns undefined if it is not smaller than the cluster
 */
export function compressCluster(cluster: Uint8Array): Uint8Array | undefined {
  const data = zlib.deflateRawSync(cluster, { windowBits: WRITE_WINDOW_BITS });
  return data.length < cluster.length ? data : undefined;
}

function inflate(data: Uint8Array, target: Uint8Array): void {
  let output: Uint8Array;
  try {
    output = zlib.inflateRawSync(data, {
      windowBits: READ_WINDOW_BITS,
      chunkSize: Math.max(target.length, MIN_CHUNK_BYTES),
      maxOutputLength: target.length,
      // A stream without its end is an error only if the cluster is not full by then.
      finishFlush: zlib.constants.Z_SYNC_FLUSH,
    });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ERR_BUFFER_TOO_LARGE') throw tooLong(target, error);
    throw new CorruptImage('the deflate data of a compressed cluster is damaged', { cause: error });
  }
  if (output.length !== target.length) throw tooShort(target, output.length);
  target.set(output);
}

const tooLong = (target: Uint8Array, cause?: unknown): CorruptImage =>
  new CorruptImage(`a compressed cluster expands to more than its ${target.length} bytes`, { cause });

const tooShort = (target: Uint8Array, bytes: number): CorruptImage =>
  new CorruptImage(`a compressed cluster expands to ${bytes} bytes only, not to ${target.length}`);

/** Frames follow one another until the cluster is full, as QEMU reads them. */
function unzstd(data: Uint8Array, target: Uint8Array): void {
  let filled = 0;
  for (let rest = data; filled < target.length; ) {
    if (rest.length === 0) throw tooShort(target, filled);
    const frame = zstdFrame(rest);
    filled += unzstdFrame(rest.subarray(0, frame.bytes), frame, target.subarray(filled));
    rest = rest.subarray(frame.bytes);
  }
}

/** What must be known of a zstd frame before it is decoded (RFC 8878, section 3.1.1). */
interface ZstdFrame {
  /** Magic, header, blocks and checksum. */
  readonly bytes: number;
  /** Memory that the decoder will ask for. */
  readonly windowBytes: number;
  readonly skippable: boolean;
}

const ZSTD_MAGIC = 0xfd2f_b528;
/** Skippable frames: this and the next 15 numbers. */
const ZSTD_SKIPPABLE = 0x184d_2a50;
const BLOCK_HEADER_BYTES = 3;
const BLOCK = { RAW: 0, RLE: 1, COMPRESSED: 2 } as const;
/** The window that every decoder is recommended to support (RFC 8878, section 3.1.1.1.2); clusters need less. */
const MAX_WINDOW_BYTES = 8 * 1024 * 1024;

const damaged = (what: string): CorruptImage =>
  new CorruptImage(`the zstd data of a compressed cluster is damaged: ${what}`);

/**
 * Walk the block headers of the frame that `data` starts with.
 * @throws CorruptImage if it is no frame, or is cut
 */
export function zstdFrame(data: Uint8Array): ZstdFrame {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const need = (end: number): void => {
    if (end > data.length) throw damaged(`it is cut after ${data.length} bytes`);
  };
  need(5);
  const magic = view.getUint32(0, true);
  if (magic >>> 4 === ZSTD_SKIPPABLE >>> 4) {
    need(8);
    const bytes = 8 + view.getUint32(4, true);
    need(bytes);
    return { bytes, windowBytes: 0, skippable: true };
  }
  if (magic !== ZSTD_MAGIC) throw damaged('a frame does not start with the magic number');

  const descriptor = view.getUint8(4);
  const singleSegment = (descriptor & 0x20) !== 0;
  const checksumBytes = (descriptor & 0x04) !== 0 ? 4 : 0;
  const dictionaryBytes = [0, 1, 2, 4][descriptor & 3] as number;
  const contentSizeBytes = [singleSegment ? 1 : 0, 2, 4, 8][descriptor >>> 6] as number;
  if (dictionaryBytes !== 0) throw damaged('it needs a dictionary');
  const contentSizeAt = singleSegment ? 5 : 6;
  let at = contentSizeAt + contentSizeBytes;
  need(at);
  let windowBytes: number;
  if (singleSegment) {
    windowBytes = contentSize(view, contentSizeAt, contentSizeBytes);
  } else {
    const window = view.getUint8(5);
    windowBytes = 2 ** (10 + (window >>> 3)) * (1 + (window & 7) / 8);
  }
  if (windowBytes > MAX_WINDOW_BYTES) throw damaged(`it asks for a window of ${windowBytes} bytes`);

  for (let last = false; !last; ) {
    need(at + BLOCK_HEADER_BYTES);
    const header = view.getUint8(at) | (view.getUint16(at + 1, true) << 8);
    last = (header & 1) !== 0;
    const type = (header >>> 1) & 3;
    if (type > BLOCK.COMPRESSED) throw damaged('a block has the reserved type');
    at += BLOCK_HEADER_BYTES + (type === BLOCK.RLE ? 1 : header >>> 3);
    need(at);
  }
  need(at + checksumBytes);
  return { bytes: at + checksumBytes, windowBytes, skippable: false };
}

function contentSize(view: DataView, at: number, bytes: number): number {
  switch (bytes) {
    case 1:
      return view.getUint8(at);
    case 2:
      return view.getUint16(at, true) + 256;
    case 4:
      return view.getUint32(at, true);
    default:
      return Number(view.getBigUint64(at, true));
  }
}

/** Decode one frame to the start of `target`. @returns the bytes it made */
function unzstdFrame(data: Uint8Array, frame: ZstdFrame, target: Uint8Array): number {
  if (frame.skippable) return 0;
  let filled = 0;
  const decoder = new Decompress((piece) => {
    if (piece.length > target.length - filled) throw tooLong(target);
    target.set(piece, filled);
    filled += piece.length;
  });
  try {
    decoder.push(data, true);
  } catch (error) {
    if (error instanceof CorruptImage) throw error;
    throw new CorruptImage('the zstd data of a compressed cluster is damaged', { cause: error });
  }
  return filled;
}
