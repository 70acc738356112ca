/** Which bhyve this host has: it restores only what the same build has saved. */
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { release, type } from 'node:os';
import { delimiter, join } from 'node:path';
import { runCommand } from '../../os/run-command.ts';

/** Digits of the check sum that are shown. */
const BUILD_DIGITS = 16;

/** The host that guests run on. */
export class BhyveHost {
  /** Asked once: it does not change while this process runs. */
  #osreldate: Promise<number | undefined> | undefined;

  /** kern.osreldate, as in 1401000 for 14.1; undefined on a host that has none. */
  osreldate(): Promise<number | undefined> {
    this.#osreldate ??= askOsreldate();
    return this.#osreldate;
  }

  /**
   * The operating system and the build of its bhyve: "FreeBSD 14.1-RELEASE-p5, bhyve 0123456789abcdef". bhyve has no
   * version of its own and FreeBSD links it without a build id, so the build is told by the program's SHA-256.
   */
  async version(): Promise<string> {
    const system = `${type()} ${release()}`;
    const folders = [...(process.env.PATH ?? '').split(delimiter), '/usr/sbin'];
    for (const folder of folders) {
      const program = await readFile(join(folder, 'bhyve')).catch(() => undefined);
      if (program === undefined) continue;
      return `${system}, bhyve ${createHash('sha256').update(program).digest('hex').slice(0, BUILD_DIGITS)}`;
    }
    return system;
  }
}

async function askOsreldate(): Promise<number | undefined> {
  try {
    const { status, stdout } = await runCommand({ program: 'sysctl', args: ['-n', 'kern.osreldate'] });
    return status === 0 && /^\d+$/.test(stdout.trim()) ? Number(stdout) : undefined;
  } catch {
    return undefined;
  }
}
