/**
 * The little that we know of QEMU's migration stream (migration/savevm.c): how it begins and ends, and where it says
 * whether the guest was running. Pure, over bytes.
 */
import { bigEndian, u8, u32 } from '../../bytes/record.ts';
import { FsError } from '../../errors.ts';
import type { StateFile } from '../guest.ts';

/** QEMU_VM_FILE_MAGIC and QEMU_VM_FILE_VERSION */
const streamHeader = bigEndian('QEMU_VM_FILE', 8, { magic: u32, version: u32 });
const MAGIC = 0x5145564d; // "QEVM"
const VERSION = 3;

/** QEMU_VM_EOF, and after it the description of the sections, in JSON, unless the machine leaves it out. */
const EOF = 0x00;
const DESCRIPTION_END = 0x7d; // "}"

/**
 * The section "globalstate" behind its name: instance and version of the section, then vmstate_globalstate
 * (migration/global_state.c): the bytes of the name of the run state with its NUL, and room for it.
 */
const NAME = Buffer.from('\x0bglobalstate\0\0\0\0\0\0\0\x01', 'latin1');
const globalState = bigEndian('vmstate_globalstate', 5, { size: u32, runState: u8 });
const PAUSED = 'paused\0';
const RUNNING = 'running\0';

/** How much of a stream's end is looked at: all devices together have some 100 KiB; RAM comes before them. */
export const TAIL_BYTES = 4 * 1024 * 1024;

/**
 * Let the stream say that the guest runs, where it says that it was paused: paused it was by us, for the saving, and
 * whoever restores it wants it to run.
 * @param tail the last bytes of the stream
 * @returns the bytes to write, and where in `tail`; undefined if there is no such section
 */
export function runningInstead(tail: Uint8Array): { readonly at: number; readonly bytes: Uint8Array } | undefined {
  const view = Buffer.from(tail.buffer, tail.byteOffset, tail.byteLength);
  const paused = Buffer.concat([NAME, globalState.encode({ size: PAUSED.length }).subarray(0, 4), Buffer.from(PAUSED)]);
  // The last one: what looks like it in the guest's memory comes before the devices.
  const found = view.lastIndexOf(paused);
  if (found < 0) return undefined;
  const bytes = new Uint8Array(globalState.at.runState + RUNNING.length);
  globalState.encode({ size: RUNNING.length }, bytes);
  bytes.set(Buffer.from(RUNNING), globalState.at.runState);
  return { at: found + NAME.length, bytes };
}

/** @throws FsError EIO if that is no whole migration stream */
export function validateStream(file: StateFile): void {
  const refuse = (why: string): never => {
    throw new FsError('EIO', `QEMU's state '${file.name}' is not whole: ${why}.`);
  };
  if (file.bytes <= streamHeader.bytes) refuse(`it has ${file.bytes} bytes`);
  const { magic, version } = streamHeader.decode(file.read(0, streamHeader.bytes));
  if (magic !== MAGIC) refuse(`it begins with 0x${magic.toString(16)}, not with QEVM`);
  if (version !== VERSION) refuse(`its format has version ${version}, not ${VERSION}`);
  const last = file.read(file.bytes - 1, file.bytes)[0];
  if (last !== EOF && last !== DESCRIPTION_END) refuse('it breaks off before the end of the stream');
}
