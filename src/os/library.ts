/**
 * The C library through koffi, loaded when the first function is called: commands that need none of them do not pay
 * for it, and a host without koffi loses only what needs it.
 */
import { createRequire } from 'node:module';
import { FsError } from '../errors.ts';
import { errnoNumber } from './errno.ts';

/** A C argument: an integer (also a pointer's value), or memory that C reads or fills during the call. */
type Argument = number | bigint | Uint8Array | null;

/** A C function returning an integer. A result of -1 becomes the negated errno; nothing is thrown for it. */
export type SystemCall = (...args: Argument[]) => number;

interface Loaded {
  readonly koffi: typeof import('koffi');
  readonly library: import('koffi').LibraryHandle;
}

/** What loading came to; a failure is not tried again. */
let outcome: Loaded | FsError | undefined;

/** Pointers and size_t have 64 bits in all structures laid out in this folder. */
const SUPPORTED = ['x64', 'arm64', 'riscv64', 'loong64'];

function loaded(): Loaded {
  outcome ??= load();
  if (outcome instanceof FsError) throw outcome;
  return outcome;
}

function load(): Loaded | FsError {
  if (!SUPPORTED.includes(process.arch)) {
    return new FsError('ENOTSUP', `system calls are known for 64-bit hosts only, this one is ${process.arch}`);
  }
  try {
    // Not `import`: it is asynchronous, and a static one would load the library in every command and thread.
    const koffi = createRequire(import.meta.url)('koffi') as Loaded['koffi'];
    return { koffi, library: koffi.load(null) };
  } catch (cause) {
    const why = (cause as Error).message.split('\n', 1)[0];
    const sentence = `the C library cannot be called: koffi did not load (${why}); run npm install again`;
    return new FsError('ENOTSUP', sentence, { cause });
  }
}

/**
 * A C function by its prototype in C, looked up at its first call. One that the C library does not have fails with
 * -ENOSYS, as one that the kernel does not have.
 * @throws FsError ENOTSUP from the call where koffi does not load
 */
export function systemCall(prototype: string): SystemCall {
  let bound: SystemCall | undefined;
  return (...args) => (bound ??= bind(prototype))(...args);
}

function bind(prototype: string): SystemCall {
  const { koffi, library } = loaded();
  let call: (...args: Argument[]) => number;
  try {
    call = library.func(prototype);
  } catch (error) {
    if (!String((error as Error).message).startsWith('Cannot find function')) throw error;
    return () => -errnoNumber('ENOSYS');
  }
  return (...args) => {
    const result = call(...args);
    return result === -1 ? -koffi.errno() : result;
  };
}

/**
 * Address of `memory`, which stays where it is for as long as `memory` is reachable.
 * An ArrayBuffer on purpose: small typed arrays may live inside the JavaScript heap, where they move.
 */
export const addressOf = (memory: ArrayBuffer): bigint => loaded().koffi.address(new Uint8Array(memory));
