import { SUBCLUSTERS } from './l2-entry.ts';

/** Numbers that follow from the header and never change while the image is open. Plain data: goes to other threads. */
export interface Geometry {
  readonly version: 2 | 3;
  readonly clusterBits: number;
  readonly clusterBytes: number;
  /** 8, or 16 with extended L2 entries. */
  readonly l2EntryBytes: number;
  /** Guest bytes that one L2 table maps. */
  readonly l2SpanBytes: number;
  /** Smallest piece with a state of its own: the subcluster, or the cluster where there are none. */
  readonly unitBytes: number;
  readonly unitsPerCluster: number;
  readonly refcountOrder: number;
  readonly refcountsPerBlock: number;
  /** Unit of the metadata caches: a whole table, or 4 KiB of it. */
  readonly sliceBytes: number;
  readonly compressionType: 'deflate' | 'zstd';
  /** Data lives in a file of its own, at guest offset = host offset, without refcounts. */
  readonly externalData: boolean;
  /** The external data file is valid raw data by itself: zeros must really be there. */
  readonly rawData: boolean;
  readonly hasBacking: boolean;
  readonly writable: boolean;
}

const SLICE_BYTES = 4096;

export function geometryOf(header: {
  readonly version: 2 | 3;
  readonly clusterBits: number;
  readonly extendedL2: boolean;
  readonly refcountOrder: number;
  readonly compressionType: 'deflate' | 'zstd';
  readonly externalDataFile: boolean;
  readonly dataFileRaw: boolean;
  readonly backingFile: string | undefined;
  readonly writable: boolean;
}): Geometry {
  const clusterBytes = 2 ** header.clusterBits;
  const l2EntryBytes = header.extendedL2 ? 16 : 8;
  const unitsPerCluster = header.extendedL2 ? SUBCLUSTERS : 1;
  return {
    version: header.version,
    clusterBits: header.clusterBits,
    clusterBytes,
    l2EntryBytes,
    l2SpanBytes: (clusterBytes / l2EntryBytes) * clusterBytes,
    unitBytes: clusterBytes / unitsPerCluster,
    unitsPerCluster,
    refcountOrder: header.refcountOrder,
    refcountsPerBlock: (clusterBytes * 8) / 2 ** header.refcountOrder,
    sliceBytes: Math.min(clusterBytes, SLICE_BYTES),
    compressionType: header.compressionType,
    externalData: header.externalDataFile,
    rawData: header.externalDataFile && header.dataFileRaw,
    hasBacking: header.backingFile !== undefined,
    writable: header.writable,
  };
}
