/** `cp --sparse` of a checkpoint of a mostly empty disk, against qemu-img convert -l. */
import { rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { run, timed } from './processes.ts';
import type { Server } from './servers.ts';
import { median, table } from './statistics.ts';
import type { Rounds } from './throughput.ts';

const MiB = 2 ** 20;
const GiB = 1024 * MiB;
const SIZE = 64 * GiB;
const PIECES = 64;
const PIECE = 4 * MiB;

export async function measureCopy(server: Server, directory: string, { rounds, say }: Rounds): Promise<string> {
  const image = join(directory, 'sparse.qcow2');
  const copy = join(directory, 'copy.raw');
  const cpMs: number[] = [];
  const convertMs: number[] = [];
  let allocated = 0;
  try {
    await run('qemu-img', ['create', '-q', '-f', 'qcow2', image, String(SIZE)]);
    const writes = Array.from(
      { length: PIECES },
      (_, index) => `write -q -P ${index + 1} ${index * (SIZE / PIECES)} ${PIECE}`,
    );
    await run('qemu-io', [...writes.flatMap((command) => ['-c', command]), image]);
    await run('qemu-img', ['snapshot', '-c', 'bench', image]);
    for (let round = 0; round < rounds; round++) {
      await rm(copy, { force: true });
      convertMs.push(await timed(() => run('qemu-img', ['convert', '-l', 'bench', '-O', 'raw', image, copy])));
      await rm(copy);
      await server.serve({ qcow2: image, size: SIZE }, async ({ directory: disk }) => {
        const source = join(disk, 'snapshots', 'bench', 'disk.raw');
        cpMs.push(await timed(() => run('cp', ['--sparse=always', source, copy])));
      });
      allocated = (await stat(copy)).blocks * 512;
      say(`copy of a checkpoint: round ${round + 1} of ${rounds}`);
    }
  } finally {
    await Promise.all([rm(image, { force: true }), rm(copy, { force: true })]);
  }
  const [convert, cp] = [median(convertMs), median(cpMs)];
  return table([
    [
      `copy out: 64 GiB with ${(PIECES * PIECE) / MiB} MiB in it`,
      'qemu-img convert -l',
      'cp --sparse',
      'cp / qemu-img',
      'allocated',
    ],
    [
      'one checkpoint',
      `${convert.toFixed(0)} ms`,
      `${cp.toFixed(0)} ms`,
      `${(cp / convert).toFixed(2)}x`,
      `${Math.round(allocated / MiB)} MiB`,
    ],
  ]);
}
