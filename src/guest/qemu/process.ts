/** QEMU's process, as far as the system shows it: nothing is known of another user's. */
import { readlink } from 'node:fs/promises';
import { basename } from 'node:path';
import { processOf } from '../../os/process-list.ts';

/** Its arguments, the program first; empty if they cannot be had, or if that is no QEMU (a manager that made the socket). */
export async function processArguments(pid: number | undefined): Promise<readonly string[]> {
  const argv = pid === undefined ? [] : ((await processOf(pid))?.argv ?? []);
  return /^(qemu|kvm)/.test(basename(argv[0] ?? '')) ? argv : [];
}

/** Its working directory, which relative paths in its arguments begin at; known on Linux only. */
export async function processDirectory(pid: number | undefined): Promise<string | undefined> {
  return pid === undefined ? undefined : readlink(`/proc/${pid}/cwd`).catch(() => undefined);
}
