/** A thread that writes, discards, flushes and checks what it reads, until it is told to stop. */
import { parentPort, workerData } from 'node:worker_threads';
import { attachContents } from '../../../dist/disk/attach-contents.js';
import {
  CELL_BYTES,
  CELLS,
  kind,
  LOG_ENTRIES,
  PIECE_CELLS,
  PRIVATE_CELLS,
  phase,
  putCells,
  random,
  SHARED_CELLS,
  stamp,
  stampOf,
  word,
} from './cells.mjs';

const { thread, threads, seed, shared, disk } = workerData;
const { words, base, logs } = shared;
const log = logs[thread];
const contents = attachContents(disk);
const below = random(seed * 1000 + thread * 77 + 1);

const MOST_CELLS = 2048;
const buffer = new Uint8Array(MOST_CELLS * CELL_BYTES);
const cells = new Int32Array(buffer.buffer);

/** Per cell: the last operation of this thread there in this generation; negative: a discard; 0: none. */
const last = new Int32Array(CELLS);
let operation = 0;
let generation = 0;

const pieces = PRIVATE_CELLS / PIECE_CELLS;

/** A range of a piece that is this thread's, or any range of the shared part. */
function choose() {
  if (below(3) > 0) {
    const piece = below(pieces / threads) * threads + thread;
    const from = below(PIECE_CELLS);
    return { first: piece * PIECE_CELLS + from, count: 1 + below(PIECE_CELLS - from) };
  }
  const from = below(SHARED_CELLS);
  const most = below(8) === 0 ? MOST_CELLS : 256;
  return { first: PRIVATE_CELLS + from, count: 1 + below(Math.min(most, SHARED_CELLS - from)) };
}

function change() {
  const { first, count } = choose();
  const doing = below(6) === 0 ? kind.DISCARD : kind.WRITE;
  operation++;
  log.set([first, count, doing], (operation - 1) * 3);
  Atomics.store(words, word.BEGUN + thread, operation);
  putCells(cells, first, count, stamp(thread, operation));
  const offset = first * CELL_BYTES;
  const length = count * CELL_BYTES;
  const attempt = () => {
    if (doing === kind.WRITE) return contents.write(buffer, 0, length, offset);
    return below(2) === 0 ? contents.discard(offset, length) : contents.writeZeroes(offset, length);
  };
  // The gate is closed for as long as a snapshot takes.
  while (!attempt()) Atomics.wait(words, word.COUNT - 1, 0, 1);
  last.fill(doing === kind.WRITE ? operation : -operation, first, first + count);
  Atomics.store(words, word.DONE + thread, operation);
}

const isOwn = (cell) => cell < PRIVATE_CELLS && Math.floor(cell / PIECE_CELLS) % threads === thread;

/** In words what is wrong with a cell; undefined if nothing is. */
function problem(index, cell, exact) {
  const found = stampOf(cells, index, cell);
  if (found === undefined) return `cell ${cell} is torn or foreign: ${cells.subarray(index * 4, index * 4 + 4).join()}`;
  if (!exact) return undefined;
  const mine = last[cell];
  if (isOwn(cell)) {
    const expected = mine === 0 ? base[cell] : mine > 0 ? stamp(thread, mine) : 0;
    return found === expected ? undefined : `own cell ${cell} is ${found.toString(16)}, not ${expected.toString(16)}`;
  }
  const isMine = found >>> 24 === thread + 1;
  if (isMine && mine !== 0 && found !== stamp(thread, mine)) {
    return `cell ${cell} is ${found.toString(16)}, though operation ${mine} came later`;
  }
  return undefined;
}

function look(exact) {
  const first = below(CELLS);
  const count = 1 + below(Math.min(MOST_CELLS, CELLS - first));
  contents.read(buffer, 0, count * CELL_BYTES, first * CELL_BYTES);
  for (let index = 0; index < count; index++) {
    let wrong = problem(index, first + index, exact);
    // The host tears a read that a write overlaps. That passes; what the engine tears stays.
    for (let turn = 0; wrong !== undefined && turn < 20; turn++) {
      Atomics.wait(words, word.COUNT - 1, 0, 1);
      contents.read(buffer, index * CELL_BYTES, CELL_BYTES, (first + index) * CELL_BYTES);
      wrong = problem(index, first + index, exact);
    }
    if (wrong !== undefined)
      throw new Error(`thread ${thread}, operation ${operation}, generation ${generation}: ${wrong}`);
  }
}

try {
  for (;;) {
    const now = Atomics.load(words, word.PHASE);
    Atomics.store(words, word.IN_PHASE + thread, now);
    if (now === phase.STOP) break;
    if (now === phase.READ_ONLY) {
      look(false);
      continue;
    }
    const newest = Atomics.load(words, word.GENERATION);
    if (newest !== generation) {
      generation = newest;
      last.fill(0);
    }
    const dice = below(100);
    if (dice < 2) contents.flush();
    else if (dice < 40 || operation === LOG_ENTRIES) look(true);
    else change();
  }
  parentPort.postMessage({ operations: operation });
} catch (error) {
  parentPort.postMessage({ error: `${error.message} ${error.cause?.message ?? ''}` });
}
