/** Compressing clusters, one after another or several at once. Reading them is in compression.ts. */
import { promisify } from 'node:util';
import * as zlib from 'node:zlib';
import type { CompressionType } from './header.ts';

/** The window that QEMU's inflate has: what is written must not need more. */
const DEFLATE_WINDOW_BITS = 12;
/** zstd's own default: a good ratio at several hundred MB/s. */
const ZSTD_LEVEL = 3;

/** Compressed bytes of one cluster; undefined if they are not fewer than the cluster has. */
export type Compressor = (cluster: Uint8Array) => Promise<Uint8Array | undefined>;

/** Deflate runs on threads of its own, so that it pays to have several clusters under way. */
export async function compressorFor(type: CompressionType): Promise<Compressor> {
  const compress = type === 'deflate' ? deflate : await zstd();
  return async (cluster) => {
    const data = await compress(cluster);
    return data.length < cluster.length ? data : undefined;
  };
}

const deflateRaw = promisify(zlib.deflateRaw) as (data: Uint8Array, options: zlib.ZlibOptions) => Promise<Uint8Array>;
const deflate = (cluster: Uint8Array): Promise<Uint8Array> => deflateRaw(cluster, { windowBits: DEFLATE_WINDOW_BITS });

type Compress = (cluster: Uint8Array) => Promise<Uint8Array>;

let loadedZstd: Promise<Compress> | undefined;

/** zstd itself, as WebAssembly: Node has it only since 22.15. Loaded once: to initialise it again would break it. */
function zstd(): Promise<Compress> {
  loadedZstd ??= import('@bokuweb/zstd-wasm').then(async ({ init, compress }) => {
    await init();
    return async (cluster) => compress(cluster, ZSTD_LEVEL);
  });
  return loadedZstd;
}
