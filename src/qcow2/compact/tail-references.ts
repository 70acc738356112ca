/**
 * Everything that refers to the clusters of the file's tail, found in one sweep over all tables. What a snapshot refers
 * to does not change while the sweep's result is used (no checkpoint is taken or deleted meanwhile). What the live
 * mapping refers to does, and only by losing references: each is looked at again before it is moved.
 */
import { setImmediate as giveWay } from 'node:timers/promises';
import { CorruptImage } from '../../errors.ts';
import { Findings } from '../findings.ts';
import { readHeader } from '../header.ts';
import type { Image } from '../image.ts';
import { compressedBytes, compressedOffset, hostOf, isCompressed } from '../l2-entry.ts';
import {
  collectTables,
  type Extent,
  l2Flag,
  OFFSET_LOW,
  type Subject,
  subjectOf,
  type Tables,
  walkL2Tables,
} from '../reference-walk.ts';
import { clusterOf, highUnitOf } from '../references.ts';
import type { SnapshotEntry } from '../snapshot-table.ts';

/** References kept at a time; where there are more, the tail looked at gets shorter. */
const MAX_REFERENCES = 2 ** 23;

/** What a cluster of the tail holds; several bits: the tables contradict each other, and it stays. */
export const role = { DATA: 1, COMPRESSED: 2, L2_TABLE: 4, METADATA: 8, FIXED: 16 } as const;

/** An L1 entry of a snapshot. */
export interface L1Place {
  /** Index in the snapshot table. */
  readonly snapshot: number;
  readonly index: number;
}

/** Compressed data at one place of the file; several entries may refer to it. */
export interface Blob {
  readonly offset: number;
  /** To the end of its last sector. */
  readonly bytes: number;
  /** Entries that refer to it: index of the L2 table, and of the entry in it. */
  readonly entries: readonly { readonly table: number; readonly entry: number }[];
}

/** Three 32-bit numbers for each reference: cluster (counted from `base`), L2 table, entry in it. */
class ReferenceList {
  words = new Int32Array(3 * 1024);
  length = 0;

  push(cluster: number, table: number, entry: number): void {
    const at = this.length * 3;
    if (at === this.words.length) {
      const larger = new Int32Array(at * 2);
      larger.set(this.words);
      this.words = larger;
    }
    this.words[at] = cluster;
    this.words[at + 1] = table;
    this.words[at + 2] = entry;
    this.length++;
  }

  /** Forget those of clusters below `first`. */
  dropBelow(first: number): void {
    let kept = 0;
    for (let at = 0; at < this.length * 3; at += 3) {
      if ((this.words[at] as number) < first) continue;
      this.words.copyWithin(kept * 3, at, at + 3);
      kept++;
    }
    this.length = kept;
  }
}

export class TailReferences {
  /** The tail: clusters from here on, up to `end`. */
  first: number;
  readonly end: number;
  readonly tables: Tables;
  /** Host cluster of each L2 table; changed when one is moved. */
  readonly l2Cluster: Float64Array;
  /** L1 entries of snapshots that refer to it. */
  readonly snapshotReferences: Uint32Array;
  /** The entry of the active L1 table that refers to it; -1 if none does. */
  readonly l1Index: Int32Array;
  /** Of L2 tables in the tail: where snapshots refer to them. */
  readonly l1Places = new Map<number, L1Place[]>();
  readonly #base: number;
  readonly #roles: Uint8Array;
  readonly #expected: Uint32Array;
  readonly #list = new ReferenceList();
  /** Of cluster `base + i`: the references from `#starts[i]` on, in `#order`. */
  #starts = new Int32Array();
  #order = new Int32Array();
  #compressed: { offset: number; bytes: number; table: number; entry: number }[] = [];

  constructor(tables: Tables, activeL1: ReadonlyMap<number, number>, first: number, end: number) {
    const { l2 } = tables;
    this.tables = tables;
    this.first = first;
    this.end = end;
    this.#base = first;
    this.#roles = new Uint8Array(end - first);
    this.#expected = new Uint32Array(end - first);
    this.l2Cluster = l2.cluster;
    this.snapshotReferences = l2.references.slice();
    this.l1Index = new Int32Array(l2.count).fill(-1);
    for (let table = 0; table < l2.count; table++) {
      const cluster = l2.cluster[table] as number;
      if (((l2.flags[table] as number) & l2Flag.ACTIVE) !== 0) {
        this.snapshotReferences[table] = (this.snapshotReferences[table] as number) - 1;
        this.l1Index[table] = activeL1.get(cluster) ?? -1;
      }
      this.note(cluster, role.L2_TABLE, l2.references[table] as number);
    }
  }

  note(cluster: number, what: number, references: number): void {
    const index = cluster - this.#base;
    if (cluster < this.first || cluster >= this.end) return;
    this.#roles[index] = (this.#roles[index] as number) | what;
    this.#expected[index] = (this.#expected[index] as number) + references;
  }

  roleOf(cluster: number): number {
    return this.#roles[cluster - this.#base] as number;
  }

  /** References that the tables had to it when they were read. */
  expected(cluster: number): number {
    return this.#expected[cluster - this.#base] as number;
  }

  timesOf(table: number): number {
    return (this.snapshotReferences[table] as number) + ((this.l1Index[table] as number) >= 0 ? 1 : 0);
  }

  addData(cluster: number, table: number, entry: number): void {
    if (cluster < this.first || cluster >= this.end) return;
    this.note(cluster, role.DATA, this.timesOf(table));
    this.#list.push(cluster - this.#base, table, entry);
    this.#limit();
  }

  addCompressed(offset: number, bytes: number, clusterBytes: number, table: number, entry: number): void {
    const last = Math.floor((offset + bytes - 1) / clusterBytes);
    if (last < this.first) return;
    for (let cluster = Math.floor(offset / clusterBytes); cluster <= last; cluster++) {
      this.note(cluster, role.COMPRESSED, this.timesOf(table));
    }
    this.#compressed.push({ offset, bytes, table, entry });
    this.#limit();
  }

  /** Too many references for the memory that they may take: only the upper half of the tail is looked at. */
  #limit(): void {
    if (this.#list.length + this.#compressed.length < MAX_REFERENCES || this.end - this.first < 2) return;
    this.first += Math.ceil((this.end - this.first) / 2);
    this.#list.dropBelow(this.first - this.#base);
  }

  /** All have been added. */
  finish(clusterBytes: number): void {
    const { words, length } = this.#list;
    const starts = new Int32Array(this.end - this.#base + 1);
    for (let at = 0; at < length * 3; at += 3) {
      const next = (words[at] as number) + 1;
      starts[next] = (starts[next] as number) + 1;
    }
    for (let index = 1; index < starts.length; index++) {
      starts[index] = (starts[index] as number) + (starts[index - 1] as number);
    }
    const fill = starts.slice();
    this.#order = new Int32Array(length);
    for (let index = 0; index < length; index++) {
      const cluster = words[index * 3] as number;
      const to = fill[cluster] as number;
      this.#order[to] = index;
      fill[cluster] = to + 1;
    }
    this.#starts = starts;
    this.#compressed = this.#compressed
      .filter(({ offset, bytes }) => Math.floor((offset + bytes - 1) / clusterBytes) >= this.first)
      .sort((a, b) => a.offset - b.offset || a.bytes - b.bytes);
  }

  /** The entries that refer to a data cluster. */
  *entriesOf(cluster: number): Generator<{ table: number; entry: number }> {
    const index = cluster - this.#base;
    for (let at = this.#starts[index] as number; at < (this.#starts[index + 1] as number); at++) {
      const word = (this.#order[at] as number) * 3;
      yield { table: this.#list.words[word + 1] as number, entry: this.#list.words[word + 2] as number };
    }
  }

  /** Compressed data that lies in the tail, or begins before it and ends there, in the order of the file. */
  *blobs(): Generator<Blob> {
    for (let from = 0; from < this.#compressed.length; ) {
      const { offset, bytes } = this.#compressed[from]!;
      let to = from + 1;
      while (this.#compressed[to]?.offset === offset && this.#compressed[to]?.bytes === bytes) to++;
      yield { offset, bytes, entries: this.#compressed.slice(from, to) };
      from = to;
    }
  }
}

/**
 * @param first where the tail begins; the one that comes back may begin further up
 * @throws CorruptImage if anything is wrong with the tables: nothing may be moved then
 */
export async function findTailReferences(
  image: Image,
  first: number,
  progress: (fraction: number) => void,
): Promise<TailReferences> {
  const header = readHeader(image.file);
  const subject = subjectOf(image.file, header);
  const findings = new Findings();
  const tables = await inPieces(collectTables(subject, findings), () => {});
  refuseDamage(image, findings);
  if (!tables.refcountsUsable) throw damaged(image, findings.messages[0] ?? 'its refcount table cannot be used');

  const end = Math.max(subject.limit, first + 1);
  const references = new TailReferences(
    tables,
    activeTables(image, header.l1TableOffset, header.l1Entries),
    first,
    end,
  );
  noteMetadata(image, references);
  findL1Places(image, references, tables.snapshots.entries);
  await inPieces(walkL2Tables(subject, tables.l2, 0, visitor(image, subject, references)), progress);
  references.finish(image.geometry.clusterBytes);
  return references;
}

async function inPieces<T>(work: Generator<unknown, T>, progress: (fraction: number) => void): Promise<T> {
  for (let since = performance.now(); ; ) {
    const step = work.next();
    if (step.done === true) return step.value;
    if (performance.now() - since < 5) continue;
    if (typeof step.value === 'number') progress(step.value);
    await giveWay();
    since = performance.now();
  }
}

const damaged = (image: Image, what: string): CorruptImage =>
  new CorruptImage(`${image.file.path} is damaged and was not compacted: ${what}; see vdskfs check`);

function refuseDamage(image: Image, { structural, lost, messages }: Findings): void {
  if (structural + lost > 0) throw damaged(image, messages[0] ?? 'a table cannot be read');
}

/** L1 index of each L2 table of the live disk, by its cluster. */
function activeTables(image: Image, offset: number, entries: number): Map<number, number> {
  const bytes = new Uint8Array(entries * 8);
  image.file.read(bytes, 0, bytes.length, offset);
  const view = new DataView(bytes.buffer);
  const found = new Map<number, number>();
  for (let index = 0; index < entries; index++) {
    const cluster = hostOf(view.getUint32(index * 8), view.getUint32(index * 8 + 4)) / image.geometry.clusterBytes;
    if (cluster === 0) continue;
    if (found.has(cluster)) throw damaged(image, `L1 entries ${found.get(cluster)} and ${index} have one L2 table`);
    found.set(cluster, index);
  }
  return found;
}

/** Bitmaps and what else is not known here stay where they are. */
function noteMetadata(image: Image, references: TailReferences): void {
  const { tables } = references;
  const { clusterBytes } = image.geometry;
  const l1Tables = new Set(tables.snapshots.entries.map(({ l1TableOffset }) => l1TableOffset / clusterBytes));
  const note = ({ cluster: first, count }: Extent, what: number): void => {
    for (let cluster = first; cluster < first + count; cluster++) references.note(cluster, what, 1);
  };
  for (const extent of tables.metadata) {
    const moves = extent === tables.activeL1 || extent === tables.snapshotTableExtent || l1Tables.has(extent.cluster);
    note(extent, moves ? role.METADATA : role.FIXED);
  }
  for (const extent of tables.refcounts) note(extent, role.METADATA);
  for (const cluster of tables.bitmapData) references.note(cluster, role.FIXED, 1);
}

/** Where snapshots refer to the L2 tables of the tail. */
function findL1Places(image: Image, references: TailReferences, snapshots: readonly SnapshotEntry[]): void {
  const { l2Cluster, l1Places, first } = references;
  const tableAt = new Map<number, number>();
  for (let table = l2Cluster.length - 1; table >= 0 && (l2Cluster[table] as number) >= first; table--) {
    tableAt.set(l2Cluster[table] as number, table);
  }
  if (tableAt.size === 0) return;
  for (const [snapshot, entry] of snapshots.entries()) {
    const bytes = new Uint8Array(entry.l1Entries * 8);
    image.file.read(bytes, 0, bytes.length, entry.l1TableOffset);
    const view = new DataView(bytes.buffer);
    for (let index = 0; index < entry.l1Entries; index++) {
      const high = view.getUint32(index * 8);
      const low = view.getUint32(index * 8 + 4);
      if ((high | low) === 0) continue;
      const table = tableAt.get(hostOf(high, low) / image.geometry.clusterBytes);
      if (table === undefined) continue;
      const places = l1Places.get(table);
      if (places === undefined) l1Places.set(table, [{ snapshot, index }]);
      else places.push({ snapshot, index });
    }
  }
}

/**
 * Writers change tables while they are read: what makes no sense is passed over. What it refers to has more counts than
 * were found, and stays where it is.
 */
function visitor(
  image: Image,
  { fileBytes }: Subject,
  references: TailReferences,
): (view: DataView, at: number, table: number) => void {
  const { clusterBytes, clusterBits, l2EntryBytes, externalData } = image.geometry;
  const highUnit = highUnitOf(clusterBits);
  return (view, tableAt, table) => {
    for (let at = tableAt, entry = 0; at < tableAt + clusterBytes; at += l2EntryBytes, entry++) {
      const high = view.getUint32(at);
      const low = view.getUint32(at + 4);
      if ((high | low) === 0) continue;
      if (isCompressed(high)) {
        if (externalData) continue;
        const offset = offsetOrNothing(high, low, clusterBits);
        const bytes = compressedBytes(high, low, clusterBits);
        if (offset >= 0 && offset < fileBytes) references.addCompressed(offset, bytes, clusterBytes, table, entry);
        continue;
      }
      if (externalData) continue;
      const cluster = clusterOf(high, low, clusterBits, highUnit);
      if ((low & OFFSET_LOW & (clusterBytes - 1)) !== 0) continue;
      references.addData(cluster, table, entry);
    }
  };
}

/** -1: above 2^53. */
function offsetOrNothing(high: number, low: number, clusterBits: number): number {
  try {
    return compressedOffset(high, low, clusterBits);
  } catch {
    return -1;
  }
}
