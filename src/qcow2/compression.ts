/**
 * Compressed clusters (qcow2 specification, "Compressed Clusters Descriptor"). The descriptor counts sectors, not
 * bytes: what follows the compressed data up to the last sector's end is padding, or another cluster's data.
 */
import * as zlib from 'node:zlib';
import { CorruptImage } from '../errors.ts';
import type { CompressionType } from './header.ts';
import { unzstd } from './zstd.ts';

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
