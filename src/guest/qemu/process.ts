/** QEMU's process, as /proc shows it (Linux); nothing is known of it elsewhere, or of another user's. */
import { readFileSync, readlinkSync } from 'node:fs';

/** Its arguments, the program first; empty if they cannot be had, or if that is no QEMU (a manager that made the socket). */
export function processArguments(pid: number | undefined): readonly string[] {
  if (pid === undefined) return [];
  try {
    const argv = readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0').slice(0, -1);
    return /qemu|kvm/i.test(argv[0] ?? '') ? argv : [];
  } catch {
    return [];
  }
}

/** Its working directory, which relative paths in its arguments begin at. */
export function processDirectory(pid: number | undefined): string | undefined {
  if (pid === undefined) return undefined;
  try {
    return readlinkSync(`/proc/${pid}/cwd`);
  } catch {
    return undefined;
  }
}
