/**
 * Which clusters of an image are one snapshot's alone, from the tables: refcounts are not trusted, so that it works on an
 * image whose last session ended in a crash, and on one that is open for reading only. Every L2 table is read once,
 * however many snapshots share it.
 */
import { CorruptImage } from '../errors.ts';
import type { Storage } from '../storage/storage.ts';
import { type Header, limits } from './header.ts';
import { compressedBytes, compressedOffset, hostOf, isCompressed } from './l2-entry.ts';
import { clusterOf, highUnitOf } from './references.ts';
import type { SnapshotEntry } from './snapshot-table.ts';
import type { Steps } from './steps.ts';
import { hex } from './units.ts';

/** Bytes of host clusters, tables included, but for `freed`. */
export interface MappingSpace {
  /** Nothing else refers to them. */
  readonly own: number;
  /** Other snapshots, or the live disk, refer to them, too. */
  readonly shared: number;
  /** What the host has allocated to its own ones: the file takes so much less without it. */
  readonly freed: number;
}

export interface ImageSpace {
  readonly live: MappingSpace;
  /** In the order of the snapshots given. One whose tables cannot be used has none. */
  readonly snapshots: readonly MappingSpace[];
}

/** Host clusters looked at in one go, 4 bytes of memory for each: 2 TiB of a file with 64 KiB clusters. */
const WINDOW_CLUSTERS = 2 ** 25;
/** Bytes of tables that one step reads, at most. */
const STEP_BYTES = 4 * 2 ** 20;

/** Owners of clusters are the numbers of mappings from 1 on, 0 for nothing and this one for several. */
const SEVERAL = 0xffff_ffff;

interface Mapping {
  readonly owner: number;
  readonly l1Offset: number;
  readonly l1Entries: number;
  readonly l2Tables: ReadonlySet<number>;
}

/**
 * The image at rest, or flushed: what is written meanwhile may be counted or not.
 * @throws CorruptImage for L1 tables that are not in the file
 */
export function* imageSpace(
  file: Storage,
  header: Header,
  snapshots: readonly SnapshotEntry[],
  windowClusters = WINDOW_CLUSTERS,
): Steps<ImageSpace> {
  const mappings = readMappings(file, header, snapshots);
  const tables = ownersOfTables(mappings);
  const references = new Map<number, number>();
  const own = new Float64Array(mappings.length + 1);
  const freed = new Float64Array(mappings.length + 1);
  const clusters = Math.ceil(file.size() / header.clusterBytes);
  for (let first = 0; first < clusters; first += windowClusters) {
    const owners = new Owners(first, Math.min(windowClusters, clusters - first));
    for (const part of countTables(file, header, tables, owners, references))
      yield (first + part * windowClusters) / clusters;
    for (const { owner, l1Offset, l1Entries } of mappings) {
      const l1First = l1Offset / header.clusterBytes;
      for (let index = 0; index < Math.ceil((l1Entries * 8) / header.clusterBytes); index++)
        owners.add(l1First + index, owner);
    }
    owners.eachRun((owner, from, count) => {
      const bytes = count * header.clusterBytes;
      own[owner] = (own[owner] as number) + bytes;
      freed[owner] = (freed[owner] as number) + allocatedBytes(file, from * header.clusterBytes, bytes);
    });
  }
  const spaces = mappings.map((mapping): MappingSpace => {
    const { owner, l1Entries, l2Tables } = mapping;
    let all = Math.ceil((l1Entries * 8) / header.clusterBytes) + l2Tables.size;
    for (const table of l2Tables) all += references.get(table) ?? 0;
    const ownBytes = own[owner] as number;
    return { own: ownBytes, shared: Math.max(0, all * header.clusterBytes - ownBytes), freed: freed[owner] as number };
  });
  const [live, ...others] = spaces;
  return { live: live as MappingSpace, snapshots: others };
}

/** The live mapping first, then the snapshots. */
function readMappings(file: Storage, header: Header, snapshots: readonly SnapshotEntry[]): Mapping[] {
  const live = { l1TableOffset: header.l1TableOffset, l1Entries: header.l1Entries, problem: undefined };
  let left = Math.max(limits.L1_BYTES, file.size());
  return [live, ...snapshots].map(({ l1TableOffset, l1Entries, problem }, index) => {
    if (problem !== undefined) return { owner: index + 1, l1Offset: 0, l1Entries: 0, l2Tables: new Set<number>() };
    left -= l1Entries * 8;
    // More tables than the file has room for lie on one another: reading them all could take for ever.
    if (left < 0)
      throw new CorruptImage(`${file.path}: its L1 tables are larger than the file; run vdskfs check on it`);
    const bytes = new Uint8Array(l1Entries * 8);
    bytes.fill(0, file.read(bytes, 0, bytes.length, l1TableOffset));
    const view = new DataView(bytes.buffer);
    const l2Tables = new Set<number>();
    for (let at = 0; at < bytes.length; at += 8) {
      const table = hostOf(view.getUint32(at), view.getUint32(at + 4));
      if (table !== 0) l2Tables.add(table);
    }
    return { owner: index + 1, l1Offset: l1TableOffset, l1Entries, l2Tables };
  });
}

function ownersOfTables(mappings: readonly Mapping[]): [table: number, owner: number][] {
  const owners = new Map<number, number>();
  for (const { owner, l2Tables } of mappings) {
    for (const table of l2Tables) owners.set(table, owners.has(table) ? SEVERAL : owner);
  }
  // In the order of the file.
  return [...owners].sort(([a], [b]) => a - b);
}

/** Who refers to each cluster of a window. */
class Owners {
  readonly #first: number;
  readonly #owners: Uint32Array;

  constructor(first: number, clusters: number) {
    this.#first = first;
    this.#owners = new Uint32Array(clusters);
  }

  add(cluster: number, owner: number): void {
    const index = cluster - this.#first;
    if (index < 0 || index >= this.#owners.length) return;
    const before = this.#owners[index] as number;
    if (before !== owner) this.#owners[index] = before === 0 ? owner : SEVERAL;
  }

  /** Adjacent clusters of one single owner. */
  eachRun(visit: (owner: number, first: number, count: number) => void): void {
    const owners = this.#owners;
    for (let index = 0; index < owners.length; ) {
      const owner = owners[index] as number;
      let end = index + 1;
      while (end < owners.length && owners[end] === owner) end++;
      if (owner !== 0 && owner !== SEVERAL) visit(owner, this.#first + index, end - index);
      index = end;
    }
  }
}

/** @param references gets the number of clusters that each table refers to, by its offset */
function* countTables(
  file: Storage,
  header: Header,
  tables: readonly (readonly [table: number, owner: number])[],
  owners: Owners,
  references: Map<number, number>,
): Steps {
  const { clusterBytes, clusterBits, extendedL2, externalDataFile } = header;
  const fileBytes = file.size();
  const entryBytes = extendedL2 ? 16 : 8;
  const highUnit = highUnitOf(clusterBits);
  const bytes = new Uint8Array(clusterBytes);
  const view = new DataView(bytes.buffer);
  let sinceStep = 0;
  for (const [index, [table, owner]] of tables.entries()) {
    if (table % clusterBytes !== 0 || table >= fileBytes) {
      throw new CorruptImage(`${file.path}: the L2 table at ${hex(table)} is not in the file; run vdskfs check on it`);
    }
    bytes.fill(0, file.read(bytes, 0, clusterBytes, table));
    owners.add(table / clusterBytes, owner);
    let plain = 0;
    const compressed = new Set<number>();
    for (let at = 0; at < clusterBytes; at += entryBytes) {
      const high = view.getUint32(at);
      const low = view.getUint32(at + 4);
      if ((high | low) === 0) continue;
      if (isCompressed(high)) {
        const host = compressedOffset(high, low, clusterBits);
        const last = Math.floor((host + compressedBytes(high, low, clusterBits) - 1) / clusterBytes);
        for (let cluster = Math.floor(host / clusterBytes); cluster <= last; cluster++) compressed.add(cluster);
        continue;
      }
      const cluster = clusterOf(high, low, clusterBits, highUnit);
      if (cluster === 0 || externalDataFile) continue;
      owners.add(cluster, owner);
      plain++;
    }
    for (const cluster of compressed) owners.add(cluster, owner);
    references.set(table, plain + compressed.size);
    sinceStep += clusterBytes;
    if (sinceStep >= STEP_BYTES) {
      sinceStep = 0;
      yield index / tables.length;
    }
  }
}

/** Of a range of the file, what the host has given space to. */
function allocatedBytes(file: Storage, offset: number, length: number): number {
  const end = offset + length;
  let sum = 0;
  for (let position = offset; position < end; ) {
    const start = file.nextData(position);
    if (start < 0 || start >= end) break;
    position = Math.min(end, file.nextHole(start));
    sum += position - start;
  }
  return sum;
}
