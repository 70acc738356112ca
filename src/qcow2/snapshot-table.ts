/** The directory of internal snapshots (qcow2 specification, "Snapshots"): one contiguous table, entries of variable length. */
import { bigEndian, u16, u32, u64 } from '../bytes/record.ts';
import { CorruptImage } from '../errors.ts';
import type { Storage } from '../storage/storage.ts';
import { type Header, limits } from './header.ts';
import { decodeText } from './header-extensions.ts';
import { hex } from './units.ts';

const entryHead = bigEndian('snapshot table entry', 40, {
  l1TableOffset: u64,
  l1Entries: u32,
  idBytes: u16,
  nameBytes: u16,
  seconds: u32,
  nanoseconds: u32,
  vmClockNs: u64,
  vmStateSize32: u32,
  extraBytes: u32,
});

/** The extra data that is defined so far; an entry may have less of it, or more. */
const extraRecord = bigEndian('snapshot extra data', 24, { vmStateSize: u64, virtualSize: u64, icount: u64 });

/**
 * Where this program keeps what it knows of a snapshot and the format has no field for: behind room for fields that the
 * format may define one day, which stays zero. QEMU keeps extra data that it does not know.
 */
const APPLICATION_DATA_AT = 64;

/** Entries start at multiples of this many bytes from the start of the table. */
const ALIGNMENT = 8;
/** QEMU's limits. */
export const MAX_EXTRA_BYTES = 1024;
/** Most bytes that `SnapshotEntry.applicationData` has room for. */
export const MAX_APPLICATION_BYTES = MAX_EXTRA_BYTES - APPLICATION_DATA_AT;
export const MAX_SNAPSHOT_TABLE_BYTES = 1024 * limits.SNAPSHOTS;
/** icount of a snapshot taken without record/replay. */
const NO_ICOUNT = 0xffff_ffff_ffff_ffffn;
const MAX_STRING_BYTES = 0xffff;

export interface SnapshotEntry {
  /** Compacting moves the table; all else never changes. */
  l1TableOffset: number;
  /** May be fewer than `virtualSize` needs (the rest is unallocated) or more (VM state). */
  readonly l1Entries: number;
  readonly id: string;
  readonly idRaw: Uint8Array;
  /** For display; `nameRaw` is what the table holds, which need not be UTF-8. */
  readonly name: string;
  readonly nameRaw: Uint8Array;
  /** When it was taken, since the epoch. */
  readonly seconds: number;
  readonly nanoseconds: number;
  /** Guest's run time in nanoseconds, 64 bits. */
  readonly vmClockNs: bigint;
  /** Bytes of VM state; 0 without memory. */
  readonly vmStateSize: number;
  /** Virtual size in bytes; the disk's where the entry does not say. */
  readonly virtualSize: number;
  readonly icount: bigint | undefined;
  /** As read, unknown tail included; `encodeSnapshotTable` replaces its known fields by the ones above. */
  readonly extraData: Uint8Array;
  /** Why its L1 table cannot be used. The entry itself stays, and can be listed. */
  readonly problem: string | undefined;
}

export interface SnapshotTable {
  readonly entries: readonly SnapshotEntry[];
  /** Bytes the table occupies in the file; 0 without snapshots. */
  readonly bytes: number;
}

const padded = (bytes: number): number => Math.ceil(bytes / ALIGNMENT) * ALIGNMENT;

/** What is read at first; most tables are smaller. */
const FIRST_WINDOW_BYTES = 64 * 1024;

/**
 * The table that `header` points at. Memory follows the entries found, not the header's count.
 * @throws CorruptImage if the table passes the end of the file, a limit, or 2^53
 */
export function readSnapshotTable(storage: Storage, header: Header): SnapshotTable {
  if (header.snapshotCount === 0) return { entries: [], bytes: 0 };
  const fileBytes = storage.size();
  const available = Math.min(Math.max(0, fileBytes - header.snapshotsOffset), MAX_SNAPSHOT_TABLE_BYTES);
  for (let window = FIRST_WINDOW_BYTES; ; window *= 4) {
    const bytes = new Uint8Array(Math.min(window, available));
    const length = storage.read(bytes, 0, bytes.length, header.snapshotsOffset);
    const table = decodeSnapshotTable(bytes.subarray(0, length), header, fileBytes, storage.path);
    if (table !== undefined) return table;
    if (window >= available) {
      throw new CorruptImage(
        `${storage.path}: the snapshot table at ${hex(header.snapshotsOffset)} claims ${header.snapshotCount} entries, which pass ` +
          (available === MAX_SNAPSHOT_TABLE_BYTES ? `the limit of ${available} bytes` : 'the end of the file'),
      );
    }
  }
}

/**
 * Decode `header.snapshotCount` entries.
 * @returns undefined if `bytes` ends before the last of them
 */
export function decodeSnapshotTable(
  bytes: Uint8Array,
  header: Pick<Header, 'snapshotCount' | 'snapshotsOffset' | 'size' | 'clusterBytes'>,
  fileBytes: number,
  path: string,
): SnapshotTable | undefined {
  const entries: SnapshotEntry[] = [];
  let at = 0;
  for (let index = 0; index < header.snapshotCount; index++) {
    if (at + entryHead.bytes > bytes.length) return undefined;
    const head = entryHead.decode(bytes, at);
    const fail = (field: string, value: number | bigint, rule: string): CorruptImage =>
      new CorruptImage(
        `${path}: snapshot table entry ${index} at ${hex(header.snapshotsOffset + at)}: ${field} is ${value}, ${rule}`,
      );
    const exact = (field: string, value: bigint): number => {
      if (value > BigInt(Number.MAX_SAFE_INTEGER)) throw fail(field, value, 'more than 2^53');
      return Number(value);
    };
    if (head.extraBytes > MAX_EXTRA_BYTES) {
      throw fail('extra_data_size', head.extraBytes, `must be at most ${MAX_EXTRA_BYTES}`);
    }
    const extraAt = at + entryHead.bytes;
    const idAt = extraAt + head.extraBytes;
    const nameAt = idAt + head.idBytes;
    const end = nameAt + head.nameBytes;
    if (end > bytes.length) return undefined;

    const known = new Uint8Array(extraRecord.bytes);
    known.set(bytes.subarray(extraAt, Math.min(idAt, extraAt + known.length)));
    const extra = extraRecord.decode(known);
    const l1TableOffset = exact('l1_table_offset', head.l1TableOffset);
    const idRaw = bytes.slice(idAt, nameAt);
    const nameRaw = bytes.slice(nameAt, end);
    entries.push({
      l1TableOffset,
      l1Entries: head.l1Entries,
      id: decodeText(idRaw),
      idRaw,
      name: decodeText(nameRaw),
      nameRaw,
      seconds: head.seconds,
      nanoseconds: head.nanoseconds,
      vmClockNs: head.vmClockNs,
      vmStateSize:
        head.extraBytes >= extraRecord.at.virtualSize ? exact('vm_state_size', extra.vmStateSize) : head.vmStateSize32,
      virtualSize:
        head.extraBytes >= extraRecord.at.icount ? exact('virtual disk size', extra.virtualSize) : header.size,
      icount: head.extraBytes >= extraRecord.bytes ? extra.icount : undefined,
      extraData: bytes.slice(extraAt, idAt),
      problem: l1Problem(l1TableOffset, head.l1Entries, header.clusterBytes, fileBytes),
    });
    at = padded(end);
  }
  return { entries, bytes: at };
}

function l1Problem(offset: number, entries: number, clusterBytes: number, fileBytes: number): string | undefined {
  if (offset % clusterBytes !== 0) return `its L1 table offset ${hex(offset)} is not aligned to a cluster`;
  if (entries * 8 > limits.L1_BYTES)
    return `its L1 table has ${entries} entries, at most ${limits.L1_BYTES / 8} can be`;
  if (entries === 0) return undefined;
  if (offset === 0) return 'its L1 table offset is 0, where the header is';
  // As for the active table, the file's last cluster may be written in part only.
  const end = Math.ceil(fileBytes / clusterBytes) * clusterBytes;
  if (offset + entries * 8 > end) return `its L1 table at ${hex(offset)} passes the end of the file`;
  return undefined;
}

/**
 * A new entry; its extra data is complete. Times are since the epoch.
 * @param application at most MAX_APPLICATION_BYTES
 */
export function newSnapshotEntry(
  fields: Pick<
    SnapshotEntry,
    'l1TableOffset' | 'l1Entries' | 'id' | 'name' | 'seconds' | 'nanoseconds' | 'virtualSize'
  > &
    Partial<Pick<SnapshotEntry, 'vmClockNs' | 'vmStateSize'>>,
  application: Uint8Array = new Uint8Array(),
): SnapshotEntry {
  const extraData = new Uint8Array(
    application.length === 0 ? extraRecord.bytes : APPLICATION_DATA_AT + application.length,
  );
  if (application.length > 0) extraData.set(application, APPLICATION_DATA_AT);
  return {
    vmClockNs: 0n,
    vmStateSize: 0,
    ...fields,
    idRaw: new TextEncoder().encode(fields.id),
    nameRaw: new TextEncoder().encode(fields.name),
    icount: undefined,
    extraData,
    problem: undefined,
  };
}

/** What `newSnapshotEntry` was given for this entry, or what some other program has there; empty if nothing. */
export const applicationData = ({ extraData }: SnapshotEntry): Uint8Array => extraData.subarray(APPLICATION_DATA_AT);

export const renamedEntry = (entry: SnapshotEntry, name: string): SnapshotEntry => ({
  ...entry,
  name,
  nameRaw: new TextEncoder().encode(name),
});

/**
 * The table's bytes, each entry padded to 8. Entries with less than the 24 known bytes of extra data are completed:
 * otherwise a later change of the disk's size would change theirs.
 * @throws RangeError if an ID or a name is longer than 65535 bytes
 */
export function encodeSnapshotTable(entries: readonly SnapshotEntry[]): Uint8Array {
  const extraBytes = (entry: SnapshotEntry): number => Math.max(entry.extraData.length, extraRecord.bytes);
  const entryBytes = (entry: SnapshotEntry): number =>
    padded(entryHead.bytes + extraBytes(entry) + entry.idRaw.length + entry.nameRaw.length);
  const target = new Uint8Array(entries.reduce((sum, entry) => sum + entryBytes(entry), 0));
  let at = 0;
  for (const entry of entries) {
    if (entry.idRaw.length > MAX_STRING_BYTES || entry.nameRaw.length > MAX_STRING_BYTES) {
      throw new RangeError('a snapshot ID or name has at most 65535 bytes');
    }
    const extraAt = at + entryHead.bytes;
    entryHead.encode(
      {
        l1TableOffset: BigInt(entry.l1TableOffset),
        l1Entries: entry.l1Entries,
        idBytes: entry.idRaw.length,
        nameBytes: entry.nameRaw.length,
        seconds: entry.seconds,
        nanoseconds: entry.nanoseconds,
        vmClockNs: entry.vmClockNs,
        // What does not fit here reads as "no VM state" to old programs, rather than as a part of it.
        vmStateSize32: entry.vmStateSize <= 0xffff_ffff ? entry.vmStateSize : 0,
        extraBytes: extraBytes(entry),
      },
      target,
      at,
    );
    target.set(entry.extraData, extraAt);
    extraRecord.encode(
      {
        vmStateSize: BigInt(entry.vmStateSize),
        virtualSize: BigInt(entry.virtualSize),
        icount: entry.icount ?? NO_ICOUNT,
      },
      target,
      extraAt,
    );
    const idAt = extraAt + extraBytes(entry);
    target.set(entry.idRaw, idAt);
    target.set(entry.nameRaw, idAt + entry.idRaw.length);
    at += entryBytes(entry);
  }
  return target;
}
