/** The three files of a saved bhyve guest, checked against each other: FILE.meta says how large the others must be. */
import { FsError } from '../../errors.ts';
import type { StateFile } from '../guest.ts';

/** A FILE.meta larger than this is none: real ones have a few kilobytes. */
const META_BYTES_MAX = 16 * 1024 * 1024;

/** A part of FILE.kern: the state of one kernel structure or device. */
interface Chunk {
  readonly what: string;
  readonly offset: number;
  readonly bytes: number;
}

/** What FILE.meta says, as far as anyone can check it. */
export interface StateDescription {
  /** Bytes of guest memory. */
  readonly memoryBytes: number;
  readonly vmName: string | undefined;
  readonly chunks: readonly Chunk[];
}

/**
 * @param files the memory file, and beside it the same name with `.kern` and `.meta`
 * @throws FsError EIO naming the first thing that does not fit
 */
export function validateStateFiles(files: readonly StateFile[]): void {
  const kern = fileEnding(files, '.kern');
  const meta = fileEnding(files, '.meta');
  const memory = files.find(({ name }) => `${name}.meta` === meta.name);
  if (memory === undefined) throw refused('the memory file is missing');
  if (memory.bytes === 0) throw refused(`${memory.name} is empty`);
  if (kern.bytes === 0) throw refused(`${kern.name} is empty`);
  if (meta.bytes === 0) throw refused(`${meta.name} is empty`);
  if (meta.bytes > META_BYTES_MAX) throw refused(`${meta.name} has ${meta.bytes} bytes, far more than it ever needs`);

  const { memoryBytes, chunks } = parseMeta(meta.name, Buffer.from(meta.read()).toString());
  if (memoryBytes !== memory.bytes) {
    throw refused(`${memory.name} has ${memory.bytes} bytes, and the guest has ${memoryBytes} bytes of memory`);
  }
  let end = 0;
  for (const { what, offset, bytes } of chunks) {
    if (offset + bytes > kern.bytes) {
      throw refused(`${what} ends at byte ${offset + bytes} of ${kern.name}, which has ${kern.bytes}`);
    }
    end = Math.max(end, offset + bytes);
  }
  if (end !== kern.bytes) throw refused(`${kern.name} has ${kern.bytes} bytes, of which ${end} are described`);
}

function fileEnding(files: readonly StateFile[], ending: string): StateFile {
  const found = files.find(({ name }) => name.endsWith(ending));
  if (found === undefined) throw refused(`the file that ends in ${ending} is missing`);
  return found;
}

/**
 * FILE.meta: JSON. Key names differ between generations: `structs` became `kern_structs`.
 * @throws FsError EIO
 */
export function parseMeta(name: string, text: string): StateDescription {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw new FsError('EIO', `the saved state is not usable: ${name} is no JSON (${(cause as Error).message})`);
  }
  const root = objectOf(json, name);
  const basics = objectOf(root['basic metadata'], `'basic metadata' of ${name}`);
  const structures = root.kern_structs ?? root.structs;
  return {
    memoryBytes: sizeOf(basics.memsize, `'memsize' of ${name}`),
    vmName: typeof basics.vmname === 'string' ? basics.vmname : undefined,
    chunks: [...chunksOf(structures, `'kern_structs' of ${name}`), ...chunksOf(root.devices, `'devices' of ${name}`)],
  };
}

function chunksOf(value: unknown, where: string): Chunk[] {
  if (!Array.isArray(value)) throw refused(`${where} is missing`);
  return value.map((entry, index) => {
    const chunk = objectOf(entry, `entry ${index} of ${where}`);
    const label = [chunk.device, chunk.debug_name, chunk.snapshot_req].find((given) => typeof given === 'string');
    const what = label === undefined ? `entry ${index} of ${where}` : `'${label}'`;
    return {
      what,
      offset: sizeOf(chunk.file_offset, `'file_offset' of ${what}`),
      bytes: sizeOf(chunk.size, `'size' of ${what}`),
    };
  });
}

function objectOf(value: unknown, where: string): Readonly<Record<string, unknown>> {
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Record<string, unknown>;
  throw refused(`${where} is missing`);
}

/** Sums of a few of them stay exact. */
const SIZE_MAX = 2 ** 52;

/** libxo writes numbers plain or, told to, as strings. */
function sizeOf(value: unknown, where: string): number {
  const size = typeof value === 'string' && /^\d+$/.test(value) ? Number(value) : value;
  if (typeof size === 'number' && Number.isInteger(size) && size >= 0 && size <= SIZE_MAX) return size;
  throw refused(`${where} is no size: ${value === undefined ? 'it is missing' : JSON.stringify(value)}`);
}

const refused = (why: string): FsError => new FsError('EIO', `the saved state is not usable: ${why}`);
