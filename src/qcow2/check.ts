/**
 * Checking and mending an image. The references to every host cluster are counted and compared with the refcounts;
 * repair writes the counts found, then the COPIED flags that follow from them.
 *
 * Write order of a repair (an arrow is a barrier): refcounts → COPIED flags → dirty and corrupt bits cleared. New
 * refcount structures: all of them, behind the end of the file → one write of the header that switches to them →
 * COPIED flags → bits. A repair that dies can be begun again: until the bits are cleared nothing relies on it.
 */
import { setImmediate as giveWay } from 'node:timers/promises';
import { CorruptImage, FsError } from '../errors.ts';
import type { Storage } from '../storage/storage.ts';
import { Findings } from './findings.ts';
import { type Header, headerAt, incompatible, limits } from './header.ts';
import { COMPRESSED, COPIED } from './l2-entry.ts';
import { getRefcount, maxRefcount, setRefcount } from './refcount-entry.ts';
import {
  collectTables,
  type Extent,
  l2Flag,
  OFFSET_HIGH,
  OFFSET_LOW,
  readOrZeros,
  referenceVisitor,
  type Subject,
  subjectOf,
  type Tables,
  walkL2Tables,
} from './reference-walk.ts';
import { encodeSnapshotTable } from './snapshot-table.ts';
import { hex, highHalf, lowHalf } from './units.ts';

export interface CheckOptions {
  /**
   * `leaks`: refcounts that are too high fall. `all`: they are all made right, in new refcount structures if the old
   * ones cannot be used.
   */
  readonly repair?: 'leaks' | 'all';
  /** Fraction done, 0 to 1. */
  readonly onProgress?: (fraction: number) => void;
  readonly signal?: AbortSignal;
  /** Host clusters whose references are counted at a time, 4 bytes each; larger files take several walks. */
  readonly windowClusters?: number;
}

/** As far as natural the fields of `qemu-img check --output=json`. */
export interface CheckReport {
  /** What is wrong now: after the repair, if there was one. */
  readonly corruptions: number;
  readonly leaks: number;
  readonly corruptionsFixed: number;
  readonly leaksFixed: number;
  /** Guest clusters of the disk, and those that have a place in the file. */
  readonly totalClusters: number;
  readonly allocatedClusters: number;
  readonly compressedClusters: number;
  /** Behind the last cluster in use, in bytes. */
  readonly imageEndOffset: number;
  /** What was found, before a repair; the first hundred. */
  readonly messages: readonly string[];
  readonly messagesLeftOut: number;
}

/** Work between two looks at the clock of the event loop. */
const SLICE_MS = 10;

/**
 * Check an image that nobody writes meanwhile. `header` may have been read with `refcountsUnusable`; after a repair
 * read it again.
 * @throws FsError EROFS to repair a read-only file, ENOSPC, EIO; the signal's reason when it is aborted
 */
export async function checkImage(storage: Storage, header: Header, options: CheckOptions = {}): Promise<CheckReport> {
  const work = check(subjectOf(storage, header, options.windowClusters), options.repair);
  for (let since = performance.now(); ; ) {
    options.signal?.throwIfAborted();
    const step = work.next();
    if (step.done === true) return step.value;
    if (performance.now() - since < SLICE_MS) continue;
    options.onProgress?.(step.value);
    await giveWay();
    since = performance.now();
  }
}

/**
 * Make refcounts and COPIED flags right after a crash (the dirty bit), and clear the bit. For openers; read the header
 * again afterwards.
 * @throws CorruptImage if more is wrong than counts: nothing was written, and the image must not be
 */
export function rebuildRefcounts(storage: Storage, header: Header): void {
  const subject = subjectOf(storage, header);
  const survey = finish(surveyImage(subject));
  if (survey.findings.structural > 0 || survey.findings.lost > 0) {
    throw new CorruptImage(
      `${storage.path}: its refcounts cannot be counted anew, since the image is damaged: ${survey.findings.messages[0]}; see vdskfs check`,
    );
  }
  if (survey.findings.corruptions + survey.findings.leaks > 0) {
    finish(mendImage(subject, survey, 'all'));
  }
  clearBehindEnd(subject, survey);
  storage.flush();
  clearBits(subject);
}

function finish<T>(work: Generator<unknown, T>): T {
  for (;;) {
    const step = work.next();
    if (step.done === true) return step.value;
  }
}

function* check(subject: Subject, repair: 'leaks' | 'all' | undefined): Generator<number, CheckReport> {
  const share = repair === undefined ? 1 : 1 / 3;
  const before = yield* scaled(surveyImage(subject), 0, share);
  if (repair === undefined) return reportOf(subject, before.findings);
  if (subject.storage.readOnly) {
    throw new FsError('EROFS', `${subject.storage.path}: cannot be repaired, since it is open read-only`);
  }
  let after = before;
  if (before.findings.corruptions + before.findings.leaks > 0) {
    const header = yield* scaled(mendImage(subject, before, repair), share, share);
    if (header === subject.header) clearBehindEnd(subject, before);
    subject.storage.flush();
    after = yield* scaled(surveyImage(subjectOf(subject.storage, header, subject.windowClusters)), 2 * share, share);
  }
  if (after.findings.corruptions === 0) clearBits(subject);
  return {
    ...reportOf(subject, after.findings),
    corruptionsFixed: Math.max(0, before.findings.corruptions - after.findings.corruptions),
    leaksFixed: Math.max(0, before.findings.leaks - after.findings.leaks),
    messages: before.findings.messages,
    messagesLeftOut: before.findings.messagesLeftOut,
  };
}

function* scaled<T>(work: Generator<number, T>, from: number, share: number): Generator<number, T> {
  for (;;) {
    const step = work.next();
    if (step.done === true) return step.value;
    yield from + step.value * share;
  }
}

const reportOf = ({ header }: Subject, findings: Findings): CheckReport => ({
  corruptions: findings.corruptions,
  leaks: findings.leaks,
  corruptionsFixed: 0,
  leaksFixed: 0,
  totalClusters: Math.ceil(header.size / header.clusterBytes),
  allocatedClusters: findings.allocatedClusters,
  compressedClusters: findings.compressedClusters,
  imageEndOffset: (findings.highestCluster + 1) * header.clusterBytes,
  messages: findings.messages,
  messagesLeftOut: findings.messagesLeftOut,
});

/** The image is whole: say so, durably. */
function clearBits({ storage, header }: Subject): void {
  const cleared = header.incompatible & ~(incompatible.DIRTY | incompatible.CORRUPT);
  if (header.version < 3 || cleared === header.incompatible) return;
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setBigUint64(0, cleared);
  storage.write(bytes, 0, bytes.length, headerAt.incompatible);
  storage.flush();
}

/** Bits of a count. */
const COUNT = 0x0fff_ffff;
/** Its refcount is wrong. */
const MISCOUNTED = 0x1000_0000;
/** The refcount is exactly one: on disk in a survey, as just written in a repair. */
const ONE = 0x2000_0000;
/** The active disk refers to it by an entry with COPIED; by one without. */
const SEEN_COPIED = 0x4000_0000;
const SEEN_UNCOPIED = 0x8000_0000;

/** References to the clusters from `first` on. */
class Counts {
  first = 0;
  length = 0;
  readonly values: Uint32Array;
  /** Something was put into `values` since they were zeros. */
  #touched = false;
  /** The highest cluster anything refers to, in the window or not. */
  highest = -1;

  constructor(size: number) {
    this.values = new Uint32Array(size);
  }

  moveTo(first: number, length: number): void {
    this.first = first;
    this.length = length;
    if (this.#touched) this.values.fill(0);
    this.#touched = false;
  }

  /** Put bits to a cluster's count, or take them away. */
  mark(index: number, bits: number, set = true): void {
    const value = this.values[index] as number;
    this.values[index] = set ? value | bits : value & ~bits;
    this.#touched = true;
  }

  add(cluster: number, times: number, flags: number): void {
    if (cluster > this.highest) this.highest = cluster;
    const index = cluster - this.first;
    if (index < 0 || index >= this.length) return;
    this.#touched = true;
    const value = this.values[index] as number;
    const seen =
      ((flags & l2Flag.COPIED) !== 0 ? SEEN_COPIED : 0) | ((flags & l2Flag.UNCOPIED) !== 0 ? SEEN_UNCOPIED : 0);
    // No honest image comes near the limit.
    this.values[index] = (value & ~COUNT) | seen | Math.min(COUNT, (value & COUNT) + times);
  }

  remove(cluster: number): void {
    const index = cluster - this.first;
    if (index >= 0 && index < this.length) this.values[index] = (this.values[index] as number) - 1;
  }

  has(cluster: number): boolean {
    return cluster >= this.first && cluster < this.first + this.length;
  }

  /** References to a cluster of the window. */
  at(cluster: number): number {
    return (this.values[cluster - this.first] as number) & COUNT;
  }

  is(cluster: number, bit: number): boolean {
    return ((this.values[cluster - this.first] as number) & bit) !== 0;
  }
}

/** What a survey found, and what a repair needs of it. */
interface Survey {
  readonly findings: Findings;
  readonly tables: Tables;
  readonly counts: Counts;
  /** The counts of the only window still stand. */
  readonly kept: boolean;
  /** One past the highest cluster that anything refers to. */
  readonly clustersUsed: number;
  /** The refcount structures cannot hold the counts where they are (or the snapshot table must be written anew). */
  readonly needsNewStructures: boolean;
  /** Refcount blocks may be written where they are: nothing else is there. */
  readonly blocksWritable: boolean;
}

const refcountsPerBlock = ({ header }: Subject): number => (header.clusterBytes * 8) / header.refcountBits;

/** Read everything, write nothing. */
function* surveyImage(subject: Subject): Generator<number, Survey> {
  const findings = new Findings();
  const tables = yield* scaledTo(0, collectTables(subject, findings));
  const perBlock = refcountsPerBlock(subject);
  const size = Math.min(subject.limit, Math.ceil(subject.windowClusters / perBlock) * perBlock);
  const counts = new Counts(size);
  let needsNewStructures = !tables.refcountsUsable || tables.snapshotsIncomplete;
  let blocksWritable = tables.refcountsUsable;

  for (let first = 0; first < subject.limit; first += size) {
    counts.moveTo(first, Math.min(size, subject.limit - first));
    // Behind the last reference there can only be leaks; a sparse file of any size costs no more walks.
    if (first === 0 || first <= counts.highest) {
      yield* countReferences(subject, tables, counts, first === 0 ? findings : undefined);
    }
    yield 0.9;
    const found = yield* compareRefcounts(subject, tables, counts, findings);
    findOverlaps(tables, counts, findings);
    if (found.missingBlock || found.overlapping) needsNewStructures = true;
    if (found.overlapping) blocksWritable = false;
    // Walked again only where the flags seen on the way do not fit the refcounts.
    if (found.copiedWrong) {
      yield* visitFlags(subject, tables, counts, (text) => {
        if (text !== '') findings.miscounted(text);
        return false;
      });
    }
  }
  return {
    findings,
    tables,
    counts,
    kept: size >= subject.limit,
    clustersUsed: counts.highest + 1,
    needsNewStructures,
    blocksWritable,
  };
}

function* scaledTo<T>(fraction: number, work: Generator<unknown, T>): Generator<number, T> {
  for (;;) {
    const step = work.next();
    if (step.done === true) return step.value;
    yield fraction;
  }
}

/** Count everything that refers to the window. */
function* countReferences(
  subject: Subject,
  tables: Tables,
  counts: Counts,
  findings: Findings | undefined,
): Generator<number> {
  for (const extents of [tables.metadata, tables.refcounts]) for (const extent of extents) countExtent(extent, counts);
  for (const cluster of tables.bitmapData) if (cluster < subject.limit) counts.add(cluster, 1, 0);
  const { l2 } = tables;
  for (let index = 0; index < l2.count; index++) {
    counts.add(l2.cluster[index] as number, l2.references[index] as number, l2.flags[index] as number);
  }
  const visit = referenceVisitor(subject, l2, counts, findings);
  yield* walkL2Tables(subject, l2, 0, visit);
}

function countExtent(extent: Extent, counts: Counts): void {
  for (let cluster = extent.cluster; cluster < extent.cluster + extent.count; cluster++) counts.add(cluster, 1, 0);
}

/** Compare the window with the refcounts on disk; marks the clusters whose refcount there is ONE. */
function* compareRefcounts(
  subject: Subject,
  tables: Tables,
  counts: Counts,
  findings: Findings,
): Generator<number, { missingBlock: boolean; overlapping: boolean; copiedWrong: boolean }> {
  const { header, fileBytes } = subject;
  const { values } = counts;
  const fileClusters = Math.ceil(fileBytes / header.clusterBytes);
  const most = maxRefcount(header.refcountOrder);
  const found = {
    missingBlock: false,
    overlapping: false,
    copiedWrong: findings.flagsWrong && counts.first === 0,
  };
  yield* walkRefcountBlocks(subject, tables, counts, (block, first, length, present) => {
    for (let entry = 0; entry < length; entry++) {
      const index = first - counts.first + entry;
      const value = values[index] as number;
      const counted = value & COUNT;
      const cluster = first + entry;
      const onDisk = refcountAt(block, entry, header.refcountOrder);
      if (onDisk === 0 && value === 0) continue;
      if (onDisk === 1) counts.mark(index, ONE);
      // The one cluster behind the end of the file exists only if something refers to it.
      if (cluster >= fileClusters && counted === 0) continue;
      if (cluster > findings.highestCluster) findings.highestCluster = cluster;
      if ((value & (onDisk === 1 ? SEEN_UNCOPIED : SEEN_COPIED)) !== 0) found.copiedWrong = true;
      if (onDisk === counted) continue;
      counts.mark(index, MISCOUNTED);
      if (onDisk > counted) {
        findings.leaked(`cluster ${cluster} leaked: its refcount is ${onDisk}, it has ${counted} references`);
        continue;
      }
      const text = `cluster ${cluster}: its refcount is ${onDisk}, it has ${counted} references`;
      findings.tooLow++;
      if (counted > most) findings.damaged(`${text}, more than ${header.refcountBits} bits can count`);
      else findings.miscounted(text);
      if (!present) found.missingBlock = true;
    }
  });
  for (const { cluster: first, count, what } of tables.refcounts) {
    for (let cluster = Math.max(first, counts.first); cluster < first + count && counts.has(cluster); cluster++) {
      if (counts.at(cluster) === 1) continue;
      findings.miscounted(`${what}: its cluster ${cluster} has another use too`);
      found.overlapping = true;
    }
  }
  return found;
}

/** An absurd 64-bit count is a leak, however large. */
function refcountAt(block: Uint8Array, entry: number, order: number): number {
  try {
    return getRefcount(block, entry, order);
  } catch {
    return Number.POSITIVE_INFINITY;
  }
}

/**
 * Visit the refcount blocks of the window; `block` is zeros where there is none (`present` false).
 * @param visit gets the cluster of the block's first entry, and how many entries lie in the window
 */
function* walkRefcountBlocks(
  subject: Subject,
  tables: Tables,
  counts: Counts,
  visit: (block: Uint8Array, first: number, length: number, present: boolean, index: number) => void,
): Generator<number> {
  const { storage, header } = subject;
  const perBlock = refcountsPerBlock(subject);
  const block = new Uint8Array(header.clusterBytes);
  const end = counts.first + counts.length;
  for (let first = counts.first; first < end; first += perBlock) {
    const index = first / perBlock;
    const offset = tables.refcountBlocks[index] ?? 0;
    // Nothing on either side: most of a sparse file.
    if (offset === 0 && first > counts.highest) continue;
    if (offset === 0) block.fill(0);
    else readOrZeros(storage, block, block.length, offset);
    visit(block, first, Math.min(perBlock, end - first), offset !== 0, index);
    yield 0.95;
  }
}

/**
 * Metadata must have its clusters for itself. The refcount structures are looked at elsewhere: a repair moves them, all
 * else stays where it is.
 */
function findOverlaps(tables: Tables, counts: Counts, findings: Findings): void {
  for (const { cluster: first, count, what } of tables.metadata) {
    for (let cluster = Math.max(first, counts.first); cluster < first + count && counts.has(cluster); cluster++) {
      if (counts.at(cluster) === 1) continue;
      findings.overlapping(`${what}: its cluster ${cluster} has another use too`, counts.is(cluster, MISCOUNTED));
    }
  }
  const { l2 } = tables;
  for (let index = 0; index < l2.count; index++) {
    const cluster = l2.cluster[index] as number;
    if (!counts.has(cluster) || counts.at(cluster) === l2.references[index]) continue;
    l2.flags[index] = (l2.flags[index] as number) | l2Flag.OVERLAPPED;
    findings.overlapping(`the L2 table in cluster ${cluster} has another use too`, counts.is(cluster, MISCOUNTED));
  }
}

/**
 * Look at the COPIED flags of all active entries whose cluster is in the window: they must be set where the refcount
 * is ONE.
 * @param wrong told of each that is not right; true: put it right in the file
 */
function* visitFlags(
  subject: Subject,
  tables: Tables,
  counts: Counts,
  wrong: (text: string) => boolean,
): Generator<number> {
  const { storage, header } = subject;
  const { clusterBytes, externalDataFile } = header;
  const entryBytes = header.extendedL2 ? 16 : 8;
  const firstWindow = counts.first === 0;

  /** @returns the entry's high half as it should be */
  const rightHigh = (high: number, low: number, isL1: boolean): number => {
    // Nothing is known of a compressed cluster's flag but that it must not be there; it is looked at once.
    if (!isL1 && (high & COMPRESSED) !== 0) return firstWindow ? (high & ~COPIED) >>> 0 : high;
    const offset = (high & OFFSET_HIGH) * 2 ** 32 + ((low & OFFSET_LOW) >>> 0);
    if (!isL1 && externalDataFile) return offset !== 0 && firstWindow ? (high | COPIED) >>> 0 : high;
    const cluster = offset / clusterBytes;
    if (offset === 0 || !Number.isInteger(cluster) || !counts.has(cluster)) return high;
    return (counts.is(cluster, ONE) ? high | COPIED : high & ~COPIED) >>> 0;
  };

  const { activeL1 } = tables;
  if (activeL1 !== undefined) {
    const l1 = new Uint8Array(header.l1Entries * 8);
    const view = new DataView(l1.buffer);
    readOrZeros(storage, l1, l1.length, header.l1TableOffset);
    for (let at = 0; at < l1.length; at += 8) {
      const high = view.getUint32(at);
      const right = rightHigh(high, view.getUint32(at + 4), true);
      if (right === high || !wrong(`L1 entry ${at / 8}: its COPIED flag does not fit the refcount`)) continue;
      view.setUint32(at, right);
      storage.write(l1, at, 8, header.l1TableOffset + at);
    }
  }
  const { l2 } = tables;
  yield* walkL2Tables(subject, l2, l2Flag.ACTIVE, (view, tableAt, table) => {
    const position = (l2.cluster[table] as number) * clusterBytes;
    let changed = false;
    for (let at = tableAt; at < tableAt + clusterBytes; at += entryBytes) {
      const high = view.getUint32(at);
      const low = view.getUint32(at + 4);
      if (high === 0 && low === 0) continue;
      const right = rightHigh(high, low, false);
      if (right === high) continue;
      // A compressed entry was told of when the references were counted.
      const compressed = (high & COMPRESSED) !== 0;
      const text = `L2 table at ${hex(position)}, entry ${(at - tableAt) / entryBytes}: its COPIED flag does not fit`;
      if (!wrong(compressed ? '' : text)) continue;
      view.setUint32(at, right);
      changed = true;
    }
    if (changed && ((l2.flags[table] as number) & l2Flag.OVERLAPPED) === 0) {
      storage.write(new Uint8Array(view.buffer), tableAt, clusterBytes, position);
    }
  });
}

/**
 * Write the refcounts that the survey found, then the COPIED flags.
 * @returns the header with what changed in it
 */
function* mendImage(subject: Subject, survey: Survey, repair: 'leaks' | 'all'): Generator<number, Header> {
  const { tables, counts, findings } = survey;
  if (repair === 'all' && survey.needsNewStructures) return yield* makeNewStructures(subject, survey);
  // To free what an unreadable table may use would lose data.
  if (!survey.blocksWritable || (repair === 'leaks' && findings.lost > 0)) return subject.header;

  for (let first = 0; first < subject.limit; first += counts.values.length) {
    yield* recount(subject, survey, first);
    const flagsWrong = yield* writeRefcounts(subject, survey, repair);
    // A flag is only as right as the refcount: with counts that are too low it would allow writing in place.
    if ((flagsWrong || findings.flagsWrong) && (repair === 'all' || findings.tooLow === 0)) {
      subject.storage.flush();
      yield* visitFlags(subject, tables, counts, () => true);
    }
  }
  return subject.header;
}

/** Count the window that begins at `first`, unless its counts still stand. */
function* recount(subject: Subject, { tables, counts, kept, clustersUsed }: Survey, first: number): Generator<number> {
  if (kept) return;
  counts.moveTo(first, Math.min(counts.values.length, subject.limit - first));
  if (first < clustersUsed) yield* countReferences(subject, tables, counts, undefined);
}

/**
 * A crash may leave counts of clusters that were never written, behind the end of the file. No check sees them, QEMU's
 * neither, until the file has grown past them: then they are leaks.
 */
function clearBehindEnd(subject: Subject, survey: Survey): void {
  const { storage, header, fileBytes } = subject;
  const { refcountBlocks } = survey.tables;
  // New structures have no such counts.
  if (survey.needsNewStructures || !survey.blocksWritable || survey.findings.lost > 0) return;
  const perBlock = refcountsPerBlock(subject);
  const end = Math.max(Math.ceil(fileBytes / header.clusterBytes), survey.clustersUsed);
  const block = new Uint8Array(header.clusterBytes);
  for (let index = Math.floor(end / perBlock); index < refcountBlocks.length; index++) {
    const offset = refcountBlocks[index] as number;
    if (offset === 0) continue;
    readOrZeros(storage, block, block.length, offset);
    let changed = false;
    for (let entry = Math.max(0, end - index * perBlock); entry < perBlock; entry++) {
      if (refcountAt(block, entry, header.refcountOrder) === 0) continue;
      setRefcount(block, entry, header.refcountOrder, 0);
      changed = true;
    }
    if (changed) storage.write(block, 0, block.length, offset);
  }
}

/** In place. Marks the clusters whose refcount is now ONE. @returns true if COPIED flags do not fit any more */
function* writeRefcounts(
  subject: Subject,
  { tables, counts, findings }: Survey,
  repair: 'leaks' | 'all',
): Generator<number, boolean> {
  const { storage, header, fileBytes } = subject;
  const { refcountOrder } = header;
  const fileClusters = Math.ceil(fileBytes / header.clusterBytes);
  const most = maxRefcount(refcountOrder);
  let flagsWrong = false;
  yield* walkRefcountBlocks(subject, tables, counts, (block, first, length, present, blockIndex) => {
    let changed = false;
    for (let entry = 0; entry < length; entry++) {
      const index = first - counts.first + entry;
      const counted = (counts.values[index] as number) & COUNT;
      const onDisk = refcountAt(block, entry, refcountOrder);
      if (onDisk === 0 && counted === 0) continue;
      if (first + entry >= fileClusters && counted === 0) continue;
      let refcount = onDisk;
      if (counted < onDisk && findings.lost === 0) refcount = counted;
      if (counted > onDisk && repair === 'all' && counted <= most) refcount = counted;
      if (refcount !== onDisk && present) {
        setRefcount(block, entry, refcountOrder, refcount);
        changed = true;
      }
      counts.mark(index, ONE, refcount === 1);
      const wrongFlag = refcount === 1 ? SEEN_UNCOPIED : SEEN_COPIED;
      if (((counts.values[index] as number) & wrongFlag) !== 0) flagsWrong = true;
    }
    if (changed) storage.write(block, 0, block.length, tables.refcountBlocks[blockIndex] as number);
  });
  return flagsWrong;
}

/**
 * New refcount table and blocks (and a new snapshot table, if the old one is incomplete) behind the end of the file.
 * The old ones are free when the header has switched; until then they, and the image, are as they were.
 * @throws FsError ENOSPC, EFBIG if the refcount table would be larger than QEMU's limit
 */
function* makeNewStructures(subject: Subject, survey: Survey): Generator<number, Header> {
  const { storage, header, fileBytes, limit } = subject;
  const { tables, counts, findings } = survey;
  const { clusterBytes, refcountOrder } = header;
  const perBlock = refcountsPerBlock(subject);
  const most = maxRefcount(refcountOrder);

  const start = Math.max(Math.ceil(fileBytes / clusterBytes), survey.clustersUsed);
  const snapshotTable = tables.snapshotsIncomplete ? encodeSnapshotTable(tables.snapshots.entries) : undefined;
  const blocksAt = start + Math.ceil((snapshotTable?.length ?? 0) / clusterBytes);
  let blocks = 0;
  let tableClusters = 0;
  for (;;) {
    const needed = Math.ceil((blocksAt + blocks + tableClusters) / perBlock);
    const neededTable = Math.ceil((needed * 8) / clusterBytes);
    if (needed === blocks && neededTable === tableClusters) break;
    blocks = needed;
    tableClusters = neededTable;
  }
  const tableAt = blocksAt + blocks;
  const total = tableAt + tableClusters;
  if (tableClusters * clusterBytes > limits.REFCOUNT_TABLE_BYTES) {
    throw new FsError('EFBIG', `${storage.path}: a refcount table for ${total} clusters would be too large`);
  }

  const table = new Uint8Array(tableClusters * clusterBytes);
  const tableView = new DataView(table.buffer);
  const block = new Uint8Array(clusterBytes);
  const old = new Uint8Array(clusterBytes);
  let flagsWrong = findings.flagsWrong;
  for (let window = 0, index = 0; index < blocks; window += counts.values.length) {
    if (window < limit) {
      yield* recount(subject, survey, window);
      // What falls away with the old structures.
      for (const extent of tables.refcounts) uncount(extent, counts);
      if (snapshotTable !== undefined && tables.snapshotTableExtent) uncount(tables.snapshotTableExtent, counts);
    }
    for (; index < blocks && index * perBlock < window + counts.values.length; index++) {
      block.fill(0);
      const oldBlock = findings.lost > 0 ? (tables.refcountBlocks[index] ?? 0) : 0;
      if (oldBlock !== 0) readOrZeros(storage, old, old.length, oldBlock);
      for (let entry = 0; entry < perBlock && index * perBlock + entry < total; entry++) {
        const cluster = index * perBlock + entry;
        if (cluster >= start) {
          setRefcount(block, entry, refcountOrder, 1);
          continue;
        }
        let refcount = Math.min(counts.at(cluster), most);
        // A table that cannot be read may use what nothing else seems to use.
        if (oldBlock !== 0) refcount = Math.max(refcount, Math.min(refcountAt(old, entry, refcountOrder), most));
        if (refcount === 0) continue;
        setRefcount(block, entry, refcountOrder, refcount);
        counts.mark(cluster - counts.first, ONE, refcount === 1);
        if (counts.is(cluster, refcount === 1 ? SEEN_UNCOPIED : SEEN_COPIED)) flagsWrong = true;
      }
      const offset = (blocksAt + index) * clusterBytes;
      storage.write(block, 0, block.length, offset);
      tableView.setUint32(index * 8, highHalf(offset));
      tableView.setUint32(index * 8 + 4, lowHalf(offset));
      yield 0.5;
    }
    // Before the switch, since the counts of this window are at hand. Until the switch the flags fit the references
    // as they are, though not the old refcounts, on which nothing relies any more.
    if (window < limit && flagsWrong) yield* visitFlags(subject, tables, counts, () => true);
  }
  if (snapshotTable !== undefined) storage.write(snapshotTable, 0, snapshotTable.length, start * clusterBytes);
  storage.write(table, 0, table.length, tableAt * clusterBytes);
  storage.flush();

  const changed = {
    refcountTableOffset: tableAt * clusterBytes,
    refcountTableClusters: tableClusters,
    snapshotsOffset: snapshotTable === undefined ? header.snapshotsOffset : start * clusterBytes,
  };
  // refcount_table_offset, refcount_table_clusters, nb_snapshots, snapshots_offset: adjacent, switched by one write.
  const fields = new Uint8Array(headerAt.incompatible - headerAt.refcountTableOffset);
  const view = new DataView(fields.buffer);
  const put = (field: keyof typeof headerAt): number => headerAt[field] - headerAt.refcountTableOffset;
  view.setBigUint64(put('refcountTableOffset'), BigInt(changed.refcountTableOffset));
  view.setUint32(put('refcountTableClusters'), changed.refcountTableClusters);
  view.setUint32(put('snapshotCount'), header.snapshotCount);
  view.setBigUint64(put('snapshotsOffset'), BigInt(changed.snapshotsOffset));
  storage.write(fields, 0, fields.length, headerAt.refcountTableOffset);
  storage.flush();
  return { ...header, ...changed };
}

function uncount({ cluster: first, count }: Extent, counts: Counts): void {
  for (let cluster = first; cluster < first + count; cluster++) counts.remove(cluster);
}
