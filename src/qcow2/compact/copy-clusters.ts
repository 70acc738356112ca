/** Copying host clusters inside the image file. */
import { FsError } from '../../errors.ts';
import type { Image } from '../image.ts';
import type { Move } from './pass.ts';

const BUFFER_BYTES = 2 ** 20;

/** Adjacent clusters that go to adjacent places. */
interface Run {
  readonly from: number;
  readonly to: number;
  count: number;
}

function runsOf(moves: readonly Move[]): Run[] {
  const runs: Run[] = [];
  for (const { from, to } of moves) {
    const last = runs.at(-1);
    if (last !== undefined && last.from + last.count === from && last.to + last.count === to) last.count++;
    else runs.push({ from, to, count: 1 });
  }
  return runs;
}

/** Copy each cluster to its new place; not durable yet. @throws FsError ENOSPC, EIO */
export function copyClusters(image: Image, moves: readonly Move[]): void {
  const { clusterBytes } = image.geometry;
  let buffer: Uint8Array | undefined;
  for (const { from, to, count } of runsOf(moves)) {
    const length = count * clusterBytes;
    if (isHole(image, from * clusterBytes, length)) {
      zero(image, to * clusterBytes, length);
      continue;
    }
    buffer ??= new Uint8Array(BUFFER_BYTES);
    for (let at = 0; at < length; at += BUFFER_BYTES) {
      const piece = Math.min(BUFFER_BYTES, length - at);
      const got = image.file.read(buffer, 0, piece, from * clusterBytes + at);
      // The last cluster of the file may be there in part only.
      buffer.fill(0, got, piece);
      image.file.write(buffer, 0, piece, to * clusterBytes + at);
    }
  }
}

/** Have the host read them ahead: copying them later is quick. */
export function readAhead(image: Image, moves: readonly Move[]): void {
  const { clusterBytes } = image.geometry;
  const buffer = new Uint8Array(Math.min(BUFFER_BYTES, moves.length * clusterBytes));
  for (const { from, count } of runsOf(moves)) {
    for (let at = 0; at < count * clusterBytes; at += buffer.length) {
      image.file.read(buffer, 0, Math.min(buffer.length, count * clusterBytes - at), from * clusterBytes + at);
    }
  }
}

function isHole(image: Image, position: number, length: number): boolean {
  const data = image.file.nextData(position);
  return data < 0 || data >= position + length;
}

function zero(image: Image, position: number, length: number): void {
  try {
    if (image.file.punch(position, length)) return;
  } catch (error) {
    if (!(error instanceof FsError)) throw error;
  }
  const zeros = new Uint8Array(Math.min(BUFFER_BYTES, length));
  for (let at = 0; at < length; at += zeros.length) {
    image.file.write(zeros, 0, Math.min(zeros.length, length - at), position + at);
  }
}
