/** What a mounted file holds, against what it should hold. */
import { type FileHandle, open, readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect } from 'vitest';
import type { SparseModel } from './corpus-model.ts';
import { Random } from './corpus-random.ts';

const CHUNK = 1 << 20;

/** Every byte of the open file is the model's. Of a sparse one: all that holds data, its surroundings, and samples of the holes. */
export async function expectContents(
  file: FileHandle,
  model: SparseModel,
  what: string,
  sparse = false,
): Promise<void> {
  expect((await file.stat()).size, `size of ${what}`).toBe(model.size);
  if (sparse) {
    for (const { start, end } of samples(model)) await expectRange(file, model, start, end - start, what);
    return;
  }
  for (let offset = 0; offset < model.size; offset += CHUNK) {
    await expectRange(file, model, offset, Math.min(CHUNK, model.size - offset), what);
  }
}

function samples(model: SparseModel): { start: number; end: number }[] {
  const random = new Random(1);
  const holes = Array.from({ length: 16 }, () => random.below(model.size)).map((start) => ({
    start,
    end: start + 9999,
  }));
  const data = model.dataRanges().map(({ start, end }) => ({ start: start - 70_000, end: end + 70_000 }));
  return [...data, ...holes].map(({ start, end }) => ({ start: Math.max(start, 0), end: Math.min(end, model.size) }));
}

/** A read(2) of that range gives the model's bytes. */
export async function expectRange(
  file: FileHandle,
  model: SparseModel,
  offset: number,
  length: number,
  what: string,
): Promise<void> {
  const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, offset);
  expect(bytesRead, `bytes read of ${what} at ${offset}`).toBe(length);
  const wanted = model.read(offset, length);
  if (buffer.equals(wanted)) return;
  const at = buffer.findIndex((byte, index) => byte !== wanted[index]);
  const bytes = (from: Buffer) => from.subarray(at, at + 16).toString('hex');
  throw new Error(
    `${what} differs at byte ${offset + at} (read ${offset}+${length}): ${bytes(buffer)}, not ${bytes(wanted)}`,
  );
}

export async function expectFile(path: string, model: SparseModel, sparse = false): Promise<void> {
  const file = await open(path, 'r');
  try {
    await expectContents(file, model, path, sparse);
  } finally {
    await file.close();
  }
}

/** info.json of a checkpoint, as far as the corpus needs it. */
export interface CheckpointInfo {
  readonly name: string;
  readonly realName: string;
  readonly id: string;
  readonly virtualSize: number;
  readonly vmStateSize: number;
  /** File name of the image that holds it. */
  readonly layer: string;
}

/** The checkpoints that the tree shows in `snapshots`, by the name of their directory. */
export async function listCheckpoints(snapshots: string): Promise<Map<string, CheckpointInfo>> {
  const found = new Map<string, CheckpointInfo>();
  for (const name of await readdir(snapshots)) {
    found.set(name, JSON.parse(await readFile(join(snapshots, name, 'info.json'), 'utf8')) as CheckpointInfo);
  }
  return found;
}
