/**
 * What a snapshot table entry keeps for a checkpoint where the format has no field: JSON, so that it can be read
 * anywhere. Whatever cannot be understood is as good as not there: any program may have written it.
 */
import type { GuestIdentity } from '../guest/guest.ts';
import { MAX_APPLICATION_BYTES } from '../qcow2/snapshot-table.ts';
import type { CheckpointDetails, Consistency } from './disk.ts';
import { type ArchivedFile, stateFileNames } from './state-archive.ts';

/** First key of the JSON, and the version of what follows. */
const VERSION = 1;

export interface CheckpointRecord {
  readonly consistency: Consistency;
  readonly guest: GuestIdentity | undefined;
  /** The state files, where they lie in the VM state. */
  readonly files: readonly ArchivedFile[];
  /** The guest did not fit; it is in the archive. */
  readonly guestInArchive: boolean;
}

/** For a checkpoint of which there is nothing to say: an entry as QEMU makes it. */
const nothing = ({ consistency, guest }: CheckpointDetails, files: readonly ArchivedFile[]): boolean =>
  consistency === 'crash' && guest === undefined && files.length === 0;

export function encodeRecord(details: CheckpointDetails, files: readonly ArchivedFile[]): Uint8Array | undefined {
  if (nothing(details, files)) return undefined;
  const record = {
    vdskfs: VERSION,
    consistency: details.consistency,
    files: files.map(({ name, offset, bytes, allocatedBytes }) => [name, offset, bytes, allocatedBytes]),
  };
  const whole = Buffer.from(JSON.stringify({ ...record, guest: details.guest }));
  return whole.length <= MAX_APPLICATION_BYTES
    ? whole
    : Buffer.from(JSON.stringify({ ...record, guestInArchive: true }));
}

/** @param vmStateBytes of the entry: files lie inside */
export function decodeRecord(bytes: Uint8Array, vmStateBytes: number): CheckpointRecord {
  const fallback = { consistency: vmStateBytes > 0 ? 'memory' : 'crash', guest: undefined, files: [] } as const;
  const value = bytes.length === 0 ? undefined : parse(Buffer.from(bytes).toString('utf8'));
  if (value?.vdskfs !== VERSION) return { ...fallback, guestInArchive: false };
  const files = Array.isArray(value.files) ? value.files.map((file) => toFile(file, vmStateBytes)) : [];
  const names = files.map((file) => file?.name);
  const valid = !names.includes(undefined) && new Set(names).size === names.length;
  return {
    // Without the memory, say because another program has dropped it, there is none.
    consistency: vmStateBytes === 0 && value.consistency === 'frozen' ? 'frozen' : fallback.consistency,
    guest: toGuest(value.guest),
    files: valid ? (files as ArchivedFile[]) : [],
    guestInArchive: value.guestInArchive === true,
  };
}

/** The text of checkpoint.json; a guest whose arguments are too long is kept without them. */
export function encodeDetails(details: CheckpointDetails, createdMs: number, capacity: number): string {
  const text = ({ consistency, guest }: CheckpointDetails): string =>
    JSON.stringify({ vdskfs: VERSION, created: new Date(createdMs).toISOString(), consistency, guest }, undefined, 1);
  const whole = text(details);
  if (Buffer.byteLength(whole) <= capacity || details.guest === undefined) return whole;
  return text({ ...details, guest: { ...details.guest, argv: [] } });
}

/** The guest of a checkpoint.json. */
export const decodeGuest = (text: string): GuestIdentity | undefined => toGuest(parse(text)?.guest);

function parse(text: string): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(text);
    return isObject(value) ? value : undefined;
  } catch {
    return undefined;
  }
}

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

function toFile(value: unknown, vmStateBytes: number): ArchivedFile | undefined {
  if (!Array.isArray(value)) return undefined;
  const [name, offset, bytes, allocatedBytes] = value as unknown[];
  const isSize = (size: unknown): size is number => Number.isSafeInteger(size) && (size as number) >= 0;
  if (typeof name !== 'string' || !stateFileNames.includes(name) || !isSize(offset) || !isSize(bytes)) return undefined;
  if (offset + bytes > vmStateBytes) return undefined;
  return { name, offset, bytes, allocatedBytes: isSize(allocatedBytes) ? Math.min(bytes, allocatedBytes) : bytes };
}

function toGuest(value: unknown): GuestIdentity | undefined {
  if (!isObject(value)) return undefined;
  const { kind, name, version, hostRelease, argv } = value;
  if ((kind !== 'bhyve' && kind !== 'qemu') || typeof name !== 'string') return undefined;
  return {
    kind,
    name,
    version: typeof version === 'string' ? version : '',
    hostRelease: typeof hostRelease === 'string' ? hostRelease : undefined,
    argv: Array.isArray(argv) ? argv.filter((word): word is string => typeof word === 'string') : [],
  };
}
