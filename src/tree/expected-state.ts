/** How much state a guest is going to write, as far as that can be guessed: for the percentage that `status` shows. */
import type { Checkpoint } from '../disk/disk.ts';
import { MEMORY_FILE } from './state-folder.ts';

const UNITS: Readonly<Record<string, number>> = { '': 2 ** 20, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40 };

/** Bytes: as much as in a checkpoint of before, else the memory that the guest was started with; undefined if neither is known. */
export function expectedStateBytes(checkpoints: readonly Checkpoint[], argv: readonly string[]): number | undefined {
  for (const { stateFiles } of checkpoints.toReversed()) {
    const memory = stateFiles.find(({ name }) => name === MEMORY_FILE);
    if (memory !== undefined) return memory.bytes;
  }
  const [, count, unit = ''] = /^(?:size=)?(\d+)([KMGT]?)/i.exec(argv[argv.indexOf('-m') + 1] ?? '') ?? [];
  return count === undefined ? undefined : Number(count) * (UNITS[unit.toUpperCase()] as number);
}
