export const CELL_BYTES: number;
export const PIECE_CELLS: number;
export const PRIVATE_CELLS: number;
export const SHARED_CELLS: number;
export const CELLS: number;
export const LOG_ENTRIES: number;
export const kind: { readonly WRITE: number; readonly DISCARD: number };
export const word: {
  readonly PHASE: number;
  readonly GENERATION: number;
  readonly IN_PHASE: number;
  readonly BEGUN: number;
  readonly DONE: number;
  readonly COUNT: number;
};
export const phase: { readonly RUN: number; readonly READ_ONLY: number; readonly STOP: number };
export function makeShared(threads: number): {
  readonly words: Int32Array;
  readonly base: Int32Array;
  readonly logs: readonly Int32Array[];
};
export function stamp(thread: number, operation: number): number;
export function putCells(words: Int32Array, first: number, count: number, value: number): void;
export function stampOf(words: Int32Array, index: number, cell: number): number | undefined;
export function random(seed: number): (below: number) => number;
