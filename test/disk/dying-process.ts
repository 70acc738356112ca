/**
 * A process that dies at its Nth change of a file or a name, played in this one: from there on every change throws, and
 * at the end all that it had open is closed, with the locks. What it wrote before is there, as after kill -9.
 */
import fs from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';

export class Died extends Error {
  override readonly name = 'Died';
}

const CHANGES = [
  'writeSync',
  'ftruncateSync',
  'fdatasyncSync',
  'fsyncSync',
  'linkSync',
  'renameSync',
  'unlinkSync',
] as const;

/** Run `life` until its change number `at`, from 0. @returns whether it died, that is had so many changes to make */
export async function dyingAt(at: number, life: () => Promise<void>): Promise<boolean> {
  const original = { ...fs };
  const open = new Set<number>();
  let left = at;
  let died = false;
  const mutable = fs as unknown as Record<string, (...args: unknown[]) => unknown>;
  for (const name of CHANGES) {
    const call = mutable[name] as (...args: unknown[]) => unknown;
    mutable[name] = (...args) => {
      if (left-- <= 0) {
        died = true;
        throw new Died(`${name} number ${at}`);
      }
      return call(...args);
    };
  }
  mutable.openSync = (...args) => {
    const creates = typeof args[1] === 'number' && (args[1] & fs.constants.O_CREAT) !== 0;
    if (creates && left-- <= 0) {
      died = true;
      throw new Died(`open number ${at}`);
    }
    const fd = (original.openSync as (...args: unknown[]) => number)(...args);
    open.add(fd);
    return fd;
  };
  mutable.closeSync = (fd) => {
    open.delete(fd as number);
    original.closeSync(fd as number);
  };
  syncBuiltinESMExports();
  try {
    await life();
  } catch (error) {
    if (!died) throw error;
  } finally {
    for (const name of [...CHANGES, 'openSync', 'closeSync'] as const) {
      mutable[name] = original[name] as (...args: unknown[]) => unknown;
    }
    syncBuiltinESMExports();
    for (const fd of open) original.closeSync(fd);
  }
  return died;
}
