/**
 * Everything that refers to host clusters, found from the header on: L1 and L2 tables of the disk and its snapshots,
 * snapshot table, bitmaps, refcount structures. Two steps: `collectTables` reads the small tables once, `walkL2Tables`
 * goes through the L2 tables in the order of the file, each one read once however many snapshots share it. What is
 * found wrong on the way is told to `Findings`; nothing here trusts a number, nor writes.
 */
import { CorruptImage } from '../errors.ts';
import type { Storage } from '../storage/storage.ts';
import { bitmapClusterOf, decodeBitmapDirectory } from './bitmap-directory.ts';
import type { Findings } from './findings.ts';
import { type Header, limits } from './header.ts';
import { ALL_ZEROES, COMPRESSED, COPIED, compressedBytes, compressedOffset } from './l2-entry.ts';
import { readSnapshotTable, type SnapshotTable } from './snapshot-table.ts';
import { hex } from './units.ts';

/** Read at a time. */
const READ_BYTES = 1024 * 1024;

export const OFFSET_HIGH = 0x00ff_ffff;
export const OFFSET_LOW = 0xffff_fe00;
/** Bits 56-62 and 0-8 of an L1 entry. */
const L1_RESERVED_HIGH = 0x7f00_0000;
const L1_RESERVED_LOW = 0x1ff;
/** Bits 56-61 and 1-8 of a standard L2 entry. */
const L2_RESERVED_HIGH = 0x3f00_0000;
const L2_RESERVED_LOW = 0x1fe;

/** An image under examination. */
export interface Subject {
  readonly storage: Storage;
  readonly header: Header;
  readonly fileBytes: number;
  /**
   * References may go to clusters below this: those of the file and, as with QEMU, one more, since the last one may
   * not be written yet.
   */
  readonly limit: number;
  /** Clusters whose references are counted at a time: 4 bytes each. */
  readonly windowClusters: number;
}

/** 128 MiB of counts: at 64 KiB clusters a file of 2 TiB in one go. */
const WINDOW_CLUSTERS = 32 * 1024 * 1024;

export function subjectOf(storage: Storage, header: Header, windowClusters = WINDOW_CLUSTERS): Subject {
  const fileBytes = storage.size();
  return { storage, header, fileBytes, limit: Math.floor(fileBytes / header.clusterBytes) + 1, windowClusters };
}

/** Clusters in a row that one table occupies. */
export interface Extent {
  readonly cluster: number;
  readonly count: number;
  readonly what: string;
}

/** Distinct L2 tables in the order of the file. */
export interface L2Tables {
  readonly count: number;
  readonly cluster: Float64Array;
  /** L1 entries that refer to it, of all L1 tables. */
  readonly references: Uint32Array;
  /** The `l2Flag`s. */
  readonly flags: Uint8Array;
}

export const l2Flag = {
  /** The active L1 table refers to it. */
  ACTIVE: 1,
  /** … by an entry with COPIED; … by one without. */
  COPIED: 2,
  UNCOPIED: 4,
  /** Something else uses the same cluster: the table must not be written. */
  OVERLAPPED: 8,
} as const;

/** What refers to clusters, apart from the entries of the L2 tables. */
export interface Tables {
  /** Header, L1 tables, snapshot table, bitmap directory and tables. */
  readonly metadata: readonly Extent[];
  /** The one of `metadata` that is the active L1 table; undefined if it cannot be read. */
  readonly activeL1: Extent | undefined;
  /** Refcount table and blocks. */
  readonly refcounts: readonly Extent[];
  /** Clusters of bitmap data. */
  readonly bitmapData: Float64Array;
  readonly l2: L2Tables;
  /** Offsets of the refcount blocks; 0 where there is none (or none that can be used). */
  readonly refcountBlocks: Float64Array;
  /** False: the refcount structures must be made anew. */
  readonly refcountsUsable: boolean;
  readonly snapshots: SnapshotTable;
  readonly snapshotTableExtent: Extent | undefined;
  /** Version 3 entries lack extra data that the specification asks for: the table must be written anew. */
  readonly snapshotsIncomplete: boolean;
}

/** Read `length` bytes; what is behind the end of the file reads as zeros. */
export function readOrZeros(storage: Storage, target: Uint8Array, length: number, position: number): void {
  target.fill(0, storage.read(target, 0, length, position), length);
}

/** A growing list of numbers. */
class NumberList {
  #values = new Float64Array(1024);
  length = 0;

  push(value: number): void {
    if (this.length === this.#values.length) {
      const larger = new Float64Array(this.length * 2);
      larger.set(this.#values);
      this.#values = larger;
    }
    this.#values[this.length++] = value;
  }

  get values(): Float64Array {
    return this.#values.subarray(0, this.length);
  }
}

/** Yields now and then, so that the caller can let others work. */
export function* collectTables(subject: Subject, findings: Findings): Generator<void, Tables> {
  const { storage, header, fileBytes } = subject;
  const { clusterBytes } = header;
  const metadata: Extent[] = [{ cluster: 0, count: 1, what: 'the header' }];

  /** @returns the extent if the range lies in the file, else says so */
  const extentOf = (what: string, offset: number, bytes: number): Extent | undefined => {
    if (bytes === 0) return undefined;
    if (!inFile(subject, offset, bytes)) {
      findings.damaged(`${what}: ${bytes} bytes at ${hex(offset)} pass the end of the file`);
      return undefined;
    }
    const cluster = Math.floor(offset / clusterBytes);
    return { cluster, count: Math.ceil((offset + bytes) / clusterBytes) - cluster, what };
  };
  const addMetadata = (what: string, offset: number, bytes: number): Extent | undefined => {
    const extent = extentOf(what, offset, bytes);
    if (extent !== undefined) metadata.push(extent);
    return extent;
  };

  let snapshots: SnapshotTable = { entries: [], bytes: 0 };
  let snapshotsIncomplete = false;
  if (header.snapshotsOffset % clusterBytes !== 0 && header.snapshotCount > 0) {
    findings.damaged(`the snapshot table at ${hex(header.snapshotsOffset)} is not aligned to a cluster`);
    findings.lost++;
  } else {
    try {
      snapshots = readSnapshotTable(storage, header);
    } catch (error) {
      if (!(error instanceof CorruptImage)) throw error;
      findings.damaged(error.message);
      findings.lost++;
    }
  }

  const l1Tables = [
    { what: 'the active L1 table', offset: header.l1TableOffset, entries: header.l1Entries, active: true },
  ];
  for (const [index, entry] of snapshots.entries.entries()) {
    const what = `snapshot ${JSON.stringify(entry.name)} (ID ${JSON.stringify(entry.id)})`;
    if (header.version >= 3 && entry.extraData.length < 16) {
      findings.miscounted(`${what}: snapshot table entry ${index} lacks extra data that version 3 asks for`);
      snapshotsIncomplete = true;
    }
    if (entry.problem !== undefined) {
      findings.damaged(`${what}: ${entry.problem}`);
      findings.lost++;
      continue;
    }
    l1Tables.push({ what: `${what}, L1 table`, offset: entry.l1TableOffset, entries: entry.l1Entries, active: false });
  }
  if (header.externalDataFile && snapshots.entries.length > 0) {
    findings.damaged(`the image has ${snapshots.entries.length} snapshots, which cannot be with an external data file`);
  }

  const collector = new L2Collector(subject, findings);
  let activeL1: Extent | undefined;
  let l1Bytes = 0;
  for (const table of l1Tables) {
    const bytes = table.entries * 8;
    l1Bytes += Math.ceil(bytes / clusterBytes) * clusterBytes;
    // More tables than the file has room for lie on one another. They are not read: that could take for ever.
    if (l1Bytes > fileBytes + clusterBytes) {
      findings.damaged(`${table.what}: the L1 tables together are larger than the file`);
      findings.lost++;
      break;
    }
    const extent = addMetadata(table.what, table.offset, bytes);
    if (extent === undefined) {
      if (bytes > 0) findings.lost++;
      continue;
    }
    if (table.active) activeL1 = extent;
    yield* collector.readL1(table);
  }
  const snapshotTableExtent = addMetadata('the snapshot table', header.snapshotsOffset, snapshots.bytes);

  const bitmapData = new NumberList();
  yield* collectBitmaps(subject, findings, addMetadata, bitmapData);

  const refcounts: Extent[] = [];
  const refcountTable = yield* readRefcountTable(subject, findings, refcounts, extentOf);
  return {
    metadata,
    activeL1,
    refcounts,
    bitmapData: bitmapData.values,
    l2: collector.finish(),
    refcountBlocks: refcountTable.blocks,
    refcountsUsable: refcountTable.usable,
    snapshots,
    snapshotTableExtent,
    snapshotsIncomplete,
  };
}

/** As QEMU has it: a range may pass the end of the file by less than a cluster, since the tail may not be written yet. */
const inFile = ({ fileBytes, header }: Subject, offset: number, bytes: number): boolean =>
  offset + bytes - fileBytes <= header.clusterBytes;

/** When a list of L2 tables is this long, duplicates are taken out. */
const COMPACT_LENGTH = 4 * 1024 * 1024;

/** Gathers the L2 tables that L1 tables refer to. */
class L2Collector {
  readonly #subject: Subject;
  readonly #findings: Findings;
  /** cluster × 8 + flags, as found. */
  #keys = new NumberList();
  #tables: L2Tables = {
    count: 0,
    cluster: new Float64Array(),
    references: new Uint32Array(),
    flags: new Uint8Array(),
  };

  constructor(subject: Subject, findings: Findings) {
    this.#subject = subject;
    this.#findings = findings;
  }

  *readL1(table: { what: string; offset: number; entries: number; active: boolean }): Generator<void> {
    const { storage, header } = this.#subject;
    const buffer = new Uint8Array(Math.min(READ_BYTES, table.entries * 8));
    const view = new DataView(buffer.buffer);
    for (let first = 0; first < table.entries; first += buffer.length / 8) {
      const count = Math.min(buffer.length / 8, table.entries - first);
      readOrZeros(storage, buffer, count * 8, table.offset + first * 8);
      for (let index = 0; index < count; index++) {
        const high = view.getUint32(index * 8);
        const low = view.getUint32(index * 8 + 4);
        if (high === 0 && low === 0) continue;
        this.#add(`${table.what}, entry ${first + index}`, high, low, table.active, header.clusterBytes);
      }
      if (this.#keys.length > COMPACT_LENGTH) this.#compact();
      yield;
    }
  }

  #add(what: string, high: number, low: number, active: boolean, clusterBytes: number): void {
    const offset = (high & OFFSET_HIGH) * 2 ** 32 + ((low & OFFSET_LOW) >>> 0);
    if ((high & L1_RESERVED_HIGH) !== 0 || (low & L1_RESERVED_LOW) !== 0) {
      this.#findings.damaged(`${what}: reserved bits are set`);
    }
    if (offset === 0) {
      // It had a table once: an entry of a table that never was is 0.
      this.#findings.damaged(`${what}: it has flags, but no L2 table`);
      this.#findings.lost++;
      return;
    }
    if (offset % clusterBytes !== 0) {
      this.#findings.damaged(`${what}: the L2 table at ${hex(offset)} is not aligned to a cluster`);
      this.#findings.lost++;
      return;
    }
    if (!inFile(this.#subject, offset, clusterBytes)) {
      this.#findings.damaged(`${what}: the L2 table at ${hex(offset)} is behind the end of the file`);
      this.#findings.lost++;
      return;
    }
    const copied = (high & COPIED) !== 0 ? l2Flag.COPIED : l2Flag.UNCOPIED;
    this.#keys.push((offset / clusterBytes) * 8 + (active ? l2Flag.ACTIVE | copied : 0));
  }

  /** Merge the keys into the tables. */
  #compact(): void {
    const keys = this.#keys.values.sort();
    const old = this.#tables;
    const most = old.count + keys.length;
    const cluster = new Float64Array(most);
    const references = new Uint32Array(most);
    const flags = new Uint8Array(most);
    let count = 0;
    for (let from = 0, key = 0; from < old.count || key < keys.length; ) {
      const ofKey = key < keys.length ? Math.floor((keys[key] as number) / 8) : Number.POSITIVE_INFINITY;
      const ofOld = from < old.count ? (old.cluster[from] as number) : Number.POSITIVE_INFINITY;
      const next = Math.min(ofKey, ofOld);
      if (count === 0 || cluster[count - 1] !== next) cluster[count++] = next;
      if (ofOld === next) {
        references[count - 1] = (references[count - 1] as number) + (old.references[from] as number);
        flags[count - 1] = (flags[count - 1] as number) | (old.flags[from] as number);
        from++;
      } else {
        references[count - 1] = (references[count - 1] as number) + 1;
        flags[count - 1] = (flags[count - 1] as number) | ((keys[key] as number) % 8);
        key++;
      }
    }
    this.#tables = {
      count,
      cluster: cluster.slice(0, count),
      references: references.slice(0, count),
      flags: flags.slice(0, count),
    };
    this.#keys = new NumberList();
  }

  finish(): L2Tables {
    this.#compact();
    return this.#tables;
  }
}

/** Far more than all bitmaps of a disk of 64 TiB have. */
const MAX_BITMAP_CLUSTERS = 16 * 1024 * 1024;

function* collectBitmaps(
  { storage, header, fileBytes }: Subject,
  findings: Findings,
  addMetadata: (what: string, offset: number, bytes: number) => Extent | undefined,
  data: NumberList,
): Generator<void> {
  const { bitmaps, clusterBytes } = header;
  if (bitmaps === undefined) return;
  const broken = (error: unknown): void => {
    if (!(error instanceof CorruptImage)) throw error;
    findings.damaged(error.message);
    findings.lost++;
  };
  if (addMetadata('the bitmap directory', bitmaps.directoryOffset, bitmaps.directoryBytes) === undefined) {
    findings.lost++;
    return;
  }
  const directory = new Uint8Array(bitmaps.directoryBytes);
  readOrZeros(storage, directory, directory.length, bitmaps.directoryOffset);
  let tables: ReturnType<typeof decodeBitmapDirectory>;
  try {
    tables = decodeBitmapDirectory(directory, bitmaps.count, header);
  } catch (error) {
    broken(error);
    return;
  }
  let allBytes = 0;
  for (const [index, table] of tables.entries()) {
    const bytes = table.entries * 8;
    allBytes += Math.ceil(bytes / clusterBytes) * clusterBytes;
    // Tables that lie on one another: following them all could take for ever.
    if (allBytes > fileBytes + clusterBytes || data.length > MAX_BITMAP_CLUSTERS) {
      findings.damaged('the bitmap tables together are larger than the file');
      findings.lost++;
      return;
    }
    if (addMetadata(`bitmap ${index}, its table`, table.offset, bytes) === undefined) {
      if (bytes > 0) findings.lost++;
      continue;
    }
    const buffer = new Uint8Array(Math.min(READ_BYTES, bytes));
    const view = new DataView(buffer.buffer);
    for (let at = 0; at < bytes; at += buffer.length) {
      const here = Math.min(buffer.length, bytes - at);
      readOrZeros(storage, buffer, here, table.offset + at);
      for (let entry = 0; entry < here; entry += 8) {
        try {
          const offset = bitmapClusterOf(view.getUint32(entry), view.getUint32(entry + 4), clusterBytes);
          if (offset !== 0) data.push(offset / clusterBytes);
        } catch (error) {
          broken(error);
        }
      }
      yield;
    }
  }
}

function* readRefcountTable(
  subject: Subject,
  findings: Findings,
  extents: Extent[],
  extentOf: (what: string, offset: number, bytes: number) => Extent | undefined,
): Generator<void, { blocks: Float64Array; usable: boolean }> {
  const { storage, header } = subject;
  const { clusterBytes, refcountTableOffset, refcountTableClusters } = header;
  const bytes = refcountTableClusters * clusterBytes;
  const unusable = { blocks: new Float64Array(), usable: false };
  // Not "structural": new refcount structures mend all that is said here.
  const wrong = (text: string): void => findings.miscounted(text);
  if (bytes === 0 || refcountTableOffset === 0 || refcountTableOffset % clusterBytes !== 0) {
    wrong(`the refcount table (${refcountTableClusters} clusters at ${hex(refcountTableOffset)}) cannot be used`);
    return unusable;
  }
  if (bytes > limits.REFCOUNT_TABLE_BYTES || !inFile(subject, refcountTableOffset, bytes)) {
    wrong(`the refcount table: ${bytes} bytes at ${hex(refcountTableOffset)} pass the end of the file`);
    return unusable;
  }
  const extent = extentOf('the refcount table', refcountTableOffset, bytes);
  if (extent !== undefined) extents.push(extent);

  const blocks = new Float64Array(bytes / 8);
  let usable = true;
  const table = new Uint8Array(bytes);
  const view = new DataView(table.buffer);
  readOrZeros(storage, table, bytes, refcountTableOffset);
  for (let index = 0; index < blocks.length; index++) {
    const high = view.getUint32(index * 8);
    const low = view.getUint32(index * 8 + 4);
    if (high === 0 && low === 0) continue;
    const offset = high * 2 ** 32 + low;
    const what = `refcount block ${index}`;
    let rule: string | undefined;
    if (offset % clusterBytes >= 512) rule = 'it is not aligned to a cluster';
    else if (offset >= subject.fileBytes) rule = 'it is behind the end of the file';
    // Without its reserved bits the offset may still be the right one; the counts are at least compared.
    else blocks[index] = offset - (offset % 512);
    if (rule === undefined && (low & 0x1ff) !== 0) rule = 'reserved bits of its entry are set';
    if (rule === undefined) {
      extents.push({ cluster: offset / clusterBytes, count: 1, what });
    } else {
      wrong(`${what} at ${hex(offset)}: ${rule}`);
      usable = false;
    }
  }
  yield;
  return { blocks, usable };
}

/**
 * Visit the L2 tables in the order of the file, adjacent ones by one read. Yields the fraction that is done.
 * @param wanted a table is visited if it has this flag; 0: all are
 * @param visit the table's bytes are at `view[at, at + clusterBytes)`, and may be changed
 */
export function* walkL2Tables(
  { storage, header }: Subject,
  tables: L2Tables,
  wanted: number,
  visit: (view: DataView, at: number, index: number) => void,
): Generator<number> {
  const { clusterBytes } = header;
  const perRead = Math.max(1, Math.floor(READ_BYTES / clusterBytes));
  const buffer = new Uint8Array(perRead * clusterBytes);
  const view = new DataView(buffer.buffer);
  for (let index = 0; index < tables.count; ) {
    if (wanted !== 0 && ((tables.flags[index] as number) & wanted) === 0) {
      index++;
      continue;
    }
    const first = tables.cluster[index] as number;
    let run = 1;
    while (run < perRead && index + run < tables.count && tables.cluster[index + run] === first + run) run++;
    readOrZeros(storage, buffer, run * clusterBytes, first * clusterBytes);
    for (let next = 0; next < run; next++) {
      if (wanted === 0 || ((tables.flags[index + next] as number) & wanted) !== 0) {
        visit(view, next * clusterBytes, index + next);
      }
    }
    index += run;
    yield index / tables.count;
  }
}

/** Where the references found in L2 tables go. */
export interface ReferenceSink {
  /** `flags` are the `l2Flag`s ACTIVE, COPIED and UNCOPIED of this entry; none for compressed data. */
  add(cluster: number, times: number, flags: number): void;
}

/**
 * A visitor of L2 tables that passes every reference on.
 * @param findings told of what is wrong; undefined on a repeated walk
 */
export function referenceVisitor(
  subject: Subject,
  tables: L2Tables,
  sink: ReferenceSink,
  findings: Findings | undefined,
): (view: DataView, at: number, index: number) => void {
  const { header, limit } = subject;
  const { clusterBytes, clusterBits, extendedL2, externalDataFile, version } = header;
  const entryBytes = extendedL2 ? 16 : 8;
  const clustersPerHigh = 2 ** 32 / clusterBytes;
  const withinCluster = clusterBytes - 1;

  const range = (what: string, offset: number, bytes: number, times: number, flags: number): void => {
    if (!inFile(subject, offset, bytes)) {
      findings?.damaged(`${what}: ${bytes} bytes at ${hex(offset)} pass the end of the file`, times);
      return;
    }
    const last = Math.floor((offset + bytes - 1) / clusterBytes);
    for (let cluster = Math.floor(offset / clusterBytes); cluster <= last && cluster < limit; cluster++) {
      sink.add(cluster, times, flags);
    }
  };

  /** Everything but the plain case of an aligned data cluster in the file. */
  const unusual = (view: DataView, at: number, table: number, index: number, times: number, active: boolean): void => {
    const high = view.getUint32(at);
    const low = view.getUint32(at + 4);
    const zero = extendedL2 ? view.getUint32(at + 8) : 0;
    const allocated = extendedL2 ? view.getUint32(at + 12) : 0;
    const what = `L2 table at ${hex((tables.cluster[table] as number) * clusterBytes)}, entry ${index}`;
    const damaged = (text: string): void => findings?.damaged(`${what}: ${text}`, times);
    const place = (compressed: boolean): void => {
      if (findings === undefined || !active) return;
      findings.allocatedClusters++;
      if (compressed) findings.compressedClusters++;
    };

    if ((high & COMPRESSED) !== 0) {
      if ((high & COPIED) !== 0 && findings !== undefined) {
        findings.miscounted(`${what}: a compressed cluster has the COPIED flag`, times);
        findings.flagsWrong = true;
      }
      if (externalDataFile) {
        damaged('a compressed cluster in an image with an external data file');
        return;
      }
      if (zero !== 0 || allocated !== 0) {
        damaged('a compressed cluster with a subcluster bitmap');
        return;
      }
      place(true);
      let offset: number;
      try {
        offset = compressedOffset(high, low, clusterBits);
      } catch {
        // Above 2^53.
        damaged('compressed data behind the end of the file');
        return;
      }
      range(what, offset, compressedBytes(high, low, clusterBits), times, 0);
      return;
    }
    const zeroFlag = (low & ALL_ZEROES) !== 0;
    if ((high & L2_RESERVED_HIGH) !== 0 || (low & L2_RESERVED_LOW) !== 0 || (zeroFlag && (version < 3 || extendedL2))) {
      damaged(`reserved bits are set (${hex(high)} ${hex(low)})`);
    }
    const offset = (high & OFFSET_HIGH) * 2 ** 32 + ((low & OFFSET_LOW) >>> 0);
    const placed = offset !== 0 || (externalDataFile && (high & COPIED) !== 0);
    if (!placed) {
      if (allocated !== 0) damaged('subclusters are allocated, but the cluster is not');
      return;
    }
    if ((zero & allocated) !== 0) {
      damaged('a subcluster is both zero and allocated');
      return;
    }
    place(false);
    if ((low & withinCluster & OFFSET_LOW) !== 0) damaged(`the cluster at ${hex(offset)} is not aligned`);
    // Data outside has an implied refcount of 1.
    if (externalDataFile && active && (high & COPIED) === 0 && findings !== undefined) findings.flagsWrong = true;
    if (!externalDataFile) range(what, offset, clusterBytes, times, active ? flagsOf(high) : 0);
  };

  return (view, tableAt, table) => {
    const times = tables.references[table] as number;
    const active = ((tables.flags[table] as number) & l2Flag.ACTIVE) !== 0;
    for (let at = tableAt, index = 0; at < tableAt + clusterBytes; at += entryBytes, index++) {
      const high = view.getUint32(at);
      const low = view.getUint32(at + 4);
      if (high === 0 && low === 0 && !extendedL2) continue;
      const cluster = (high & OFFSET_HIGH) * clustersPerHigh + (low >>> clusterBits);
      const plain =
        (high & (COMPRESSED | L2_RESERVED_HIGH)) === 0 &&
        (low & withinCluster) === 0 &&
        cluster !== 0 &&
        cluster < limit &&
        !externalDataFile &&
        (!extendedL2 || (view.getUint32(at + 8) & view.getUint32(at + 12)) === 0);
      if (!plain) {
        unusual(view, at, table, index, times, active);
        continue;
      }
      if (active && findings !== undefined) findings.allocatedClusters++;
      sink.add(cluster, times, active ? flagsOf(high) : 0);
    }
  };
}

const flagsOf = (high: number): number => l2Flag.ACTIVE | ((high & COPIED) !== 0 ? l2Flag.COPIED : l2Flag.UNCOPIED);
