/**
 * Zstandard decoding into a buffer of known size (RFC 8878; sections are cited below). Made for hostile input: the work
 * is bounded by input and output, the output is also the window, and every length is checked before it is used.
 */
import { CorruptImage } from '../errors.ts';

const MAGIC = 0xfd2f_b528;
/** Skippable frames: this and the next 15 numbers (3.1.2). */
const SKIPPABLE = 0x184d_2a50;
const MAX_BLOCK_BYTES = 128 * 1024;
/** Bytes that may be read, but never count, behind the input. */
const MARGIN_BYTES = 8;

const damaged = (what: string): CorruptImage => new CorruptImage(`zstd data is damaged: ${what}`);

/**
 * Decode frames until `target` is full. What follows the last frame is ignored.
 * @throws CorruptImage if the data is damaged, or makes less or more than `target` holds
 */
export function unzstd(source: Uint8Array, target: Uint8Array): void {
  const input = new Uint8Array(source.length + MARGIN_BYTES);
  input.set(source);
  const output: Output = { bytes: target, length: 0 };
  for (let at = 0; output.length < target.length; ) {
    if (at >= source.length) throw damaged(`it makes ${output.length} bytes only, not ${target.length}`);
    at = decodeFrame(input, at, source.length, output);
  }
}

interface Output {
  readonly bytes: Uint8Array;
  length: number;
}

/** What blocks of one frame leave to the next. */
interface FrameState {
  readonly start: number;
  /** Repeat offsets, latest first (3.1.1.5). */
  readonly offsets: [number, number, number];
  huffman: HuffmanTable | undefined;
  literalLengths: FseTable | undefined;
  offsetCodes: FseTable | undefined;
  matchLengths: FseTable | undefined;
}

const BLOCK = { RAW: 0, RLE: 1, COMPRESSED: 2 } as const;

/** @returns the offset behind the frame (3.1.1) */
function decodeFrame(input: Uint8Array, start: number, end: number, output: Output): number {
  const view = new DataView(input.buffer);
  const need = (upTo: number): void => {
    if (upTo > end) throw damaged(`it is cut after ${end} bytes`);
  };
  need(start + 5);
  const magic = view.getUint32(start, true);
  if (magic >>> 4 === SKIPPABLE >>> 4) {
    need(start + 8);
    const next = start + 8 + view.getUint32(start + 4, true);
    need(next);
    return next;
  }
  if (magic !== MAGIC) throw damaged('a frame does not start with the magic number');

  const descriptor = view.getUint8(start + 4);
  const singleSegment = (descriptor & 0x20) !== 0;
  if ((descriptor & 0x08) !== 0) throw damaged('the reserved bit of a frame is set');
  if ((descriptor & 3) !== 0) throw damaged('it needs a dictionary');
  const contentSizeBytes = [singleSegment ? 1 : 0, 2, 4, 8][descriptor >>> 6] as number;
  // The window's and the content's size are of no use here: the output is at hand, and its size is known.
  let at = start + 5 + (singleSegment ? 0 : 1) + contentSizeBytes;

  const state: FrameState = {
    start: output.length,
    offsets: [1, 4, 8],
    huffman: undefined,
    literalLengths: undefined,
    offsetCodes: undefined,
    matchLengths: undefined,
  };
  for (let last = false; !last; ) {
    need(at + 3);
    const header = view.getUint8(at) | (view.getUint16(at + 1, true) << 8);
    at += 3;
    last = (header & 1) !== 0;
    const bytes = header >>> 3;
    switch ((header >>> 1) & 3) {
      case BLOCK.RAW:
        need(at + bytes);
        room(output, bytes);
        output.bytes.set(input.subarray(at, at + bytes), output.length);
        output.length += bytes;
        at += bytes;
        break;
      case BLOCK.RLE:
        need(at + 1);
        room(output, bytes);
        output.bytes.fill(input[at] as number, output.length, output.length + bytes);
        output.length += bytes;
        at += 1;
        break;
      case BLOCK.COMPRESSED:
        need(at + bytes);
        if (bytes > MAX_BLOCK_BYTES) throw damaged(`a block has ${bytes} bytes`);
        decodeBlock(input, at, at + bytes, state, output);
        at += bytes;
        break;
      default:
        throw damaged('a block has the reserved type');
    }
  }
  if ((descriptor & 0x04) !== 0) at += 4;
  need(at);
  return at;
}

function room(output: Output, bytes: number): void {
  if (bytes > output.bytes.length - output.length) throw damaged(`it makes more than ${output.bytes.length} bytes`);
}

const CUT = 'a block ends too early';

/** 3.1.1.3: literals, then the sequences that mix them with copies of earlier output. */
function decodeBlock(input: Uint8Array, start: number, end: number, state: FrameState, output: Output): void {
  const { literals, next } = decodeLiterals(input, start, end, state);
  let at = next;
  if (at >= end) throw damaged(CUT);
  let count = input[at++] as number;
  if (count >= 128) {
    if (count < 255) count = ((count - 128) << 8) + (input[at++] as number);
    else {
      count = (input[at] as number) + ((input[at + 1] as number) << 8) + 0x7f00;
      at += 2;
    }
  }
  if (count === 0) {
    if (at !== end) throw damaged('something follows the literals of a block without sequences');
    append(output, literals, 0, literals.length);
    return;
  }
  const modes = input[at++] as number;
  if (at > end) throw damaged(CUT);
  if ((modes & 3) !== 0) throw damaged('reserved bits of the symbol modes are set');
  const cursor = { at };
  const ll = sequenceTable(input, cursor, end, modes >>> 6, LITERAL_LENGTHS, state.literalLengths);
  const of = sequenceTable(input, cursor, end, (modes >>> 4) & 3, OFFSET_CODES, state.offsetCodes);
  const ml = sequenceTable(input, cursor, end, (modes >>> 2) & 3, MATCH_LENGTHS, state.matchLengths);
  state.literalLengths = ll;
  state.offsetCodes = of;
  state.matchLengths = ml;

  const bits = new BackwardBits(input, cursor.at, end);
  let llState = bits.read(ll.log);
  let ofState = bits.read(of.log);
  let mlState = bits.read(ml.log);
  let literalAt = 0;
  for (let sequence = 0; sequence < count; sequence++) {
    const offsetCode = of.symbols[ofState] as number;
    // No cluster is that large; and more than 25 bits cannot be read at once.
    if (offsetCode > 24) throw damaged('a match is further back than the data');
    const offsetValue = 2 ** offsetCode + bits.read(offsetCode);
    const mlCode = ml.symbols[mlState] as number;
    const matchLength = (MATCH_LENGTHS.base[mlCode] as number) + bits.read(MATCH_LENGTHS.bits[mlCode] as number);
    const llCode = ll.symbols[llState] as number;
    const literalLength = (LITERAL_LENGTHS.base[llCode] as number) + bits.read(LITERAL_LENGTHS.bits[llCode] as number);
    if (sequence < count - 1) {
      llState = (ll.base[llState] as number) + bits.read(ll.bits[llState] as number);
      mlState = (ml.base[mlState] as number) + bits.read(ml.bits[mlState] as number);
      ofState = (of.base[ofState] as number) + bits.read(of.bits[ofState] as number);
    }
    if (bits.left < 0) throw damaged('the sequences end too early');
    if (literalLength > literals.length - literalAt) throw damaged('the literals end too early');
    append(output, literals, literalAt, literalLength);
    literalAt += literalLength;
    copyMatch(output, state.start, nextOffset(state.offsets, offsetValue, literalLength), matchLength);
  }
  if (bits.left !== 0) throw damaged('something follows the sequences');
  append(output, literals, literalAt, literals.length - literalAt);
}

function append(output: Output, literals: Uint8Array, at: number, length: number): void {
  room(output, length);
  const { bytes, length: to } = output;
  // Most runs are shorter than what a call of set costs.
  if (length < 32) for (let index = 0; index < length; index++) bytes[to + index] = literals[at + index] as number;
  else bytes.set(literals.subarray(at, at + length), to);
  output.length += length;
}

function copyMatch(output: Output, frameStart: number, offset: number, length: number): void {
  room(output, length);
  const { bytes, length: to } = output;
  const from = to - offset;
  if (from < frameStart) throw damaged('a match is further back than the data');
  // An overlapping match repeats what it has just written.
  if (offset >= length && length >= 32) bytes.copyWithin(to, from, from + length);
  else for (let index = 0; index < length; index++) bytes[to + index] = bytes[from + index] as number;
  output.length += length;
}

/** Repeat offsets (3.1.1.5). */
function nextOffset(offsets: [number, number, number], value: number, literalLength: number): number {
  const [first, second, third] = offsets;
  let offset: number;
  if (value > 3) {
    offset = value - 3;
    offsets[2] = second;
  } else {
    const which = value - 1 + (literalLength === 0 ? 1 : 0);
    if (which === 0) return first;
    offset = which === 1 ? second : which === 2 ? third : first - 1;
    if (offset === 0) throw damaged('a match offset is 0');
    if (which > 1) offsets[2] = second;
  }
  offsets[1] = first;
  offsets[0] = offset;
  return offset;
}

const LITERALS = { RAW: 0, RLE: 1, COMPRESSED: 2, TREELESS: 3 } as const;

/** 3.1.1.3.1 */
function decodeLiterals(
  input: Uint8Array,
  start: number,
  end: number,
  state: FrameState,
): { literals: Uint8Array; next: number } {
  if (end - start < 1) throw damaged(CUT);
  const byte = (index: number): number => input[start + index] as number;
  const type = byte(0) & 3;
  const format = (byte(0) >>> 2) & 3;
  if (type === LITERALS.RAW || type === LITERALS.RLE) {
    let size = byte(0) >>> 3;
    let at = start + 1;
    if (format === 1) {
      size = (byte(0) >>> 4) | (byte(1) << 4);
      at = start + 2;
    } else if (format === 3) {
      size = (byte(0) >>> 4) | (byte(1) << 4) | (byte(2) << 12);
      at = start + 3;
    }
    checkLiterals(size);
    const next = at + (type === LITERALS.RAW ? size : 1);
    if (next > end) throw damaged(CUT);
    if (type === LITERALS.RAW) return { literals: input.subarray(at, next), next };
    return { literals: new Uint8Array(size).fill(input[at] as number), next };
  }

  const low = (byte(0) | (byte(1) << 8) | (byte(2) << 16) | (byte(3) << 24)) >>> 0;
  const sizes = [
    { size: (low >>> 4) & 0x3ff, compressed: (low >>> 14) & 0x3ff, header: 3 },
    { size: (low >>> 4) & 0x3ff, compressed: (low >>> 14) & 0x3ff, header: 3 },
    { size: (low >>> 4) & 0x3fff, compressed: low >>> 18, header: 4 },
    { size: (low >>> 4) & 0x3ffff, compressed: (low >>> 22) | (byte(4) << 10), header: 5 },
  ][format] as { size: number; compressed: number; header: number };
  checkLiterals(sizes.size);
  let at = start + sizes.header;
  const next = at + sizes.compressed;
  if (next > end) throw damaged(CUT);
  if (type === LITERALS.COMPRESSED) {
    const read = readHuffmanTable(input, at, next);
    state.huffman = read.table;
    at = read.next;
  }
  const table = state.huffman;
  if (table === undefined) throw damaged('literals without a Huffman table');
  const literals = new Uint8Array(sizes.size);
  if (format === 0) {
    decodeHuffman(input, at, next, table, literals, 0, sizes.size);
    return { literals, next };
  }
  // Four streams; the lengths of the first three come first (3.1.1.3.1.6).
  if (next - at < 6) throw damaged(CUT);
  const quarter = Math.floor((sizes.size + 3) / 4);
  let from = at + 6;
  for (let stream = 0; stream < 4; stream++) {
    const length = (input[at + stream * 2] as number) | ((input[at + stream * 2 + 1] as number) << 8);
    const to = stream < 3 ? from + length : next;
    const first = Math.min(stream * quarter, sizes.size);
    const last = stream < 3 ? Math.min(first + quarter, sizes.size) : sizes.size;
    if (to > next) throw damaged(CUT);
    decodeHuffman(input, from, to, table, literals, first, last);
    from = to;
  }
  return { literals, next };
}

function checkLiterals(size: number): void {
  if (size > MAX_BLOCK_BYTES) throw damaged(`a block has ${size} bytes of literals`);
}

/** Bits of a stream that is read from its end; the highest set bit of the last byte marks it (4.1). */
class BackwardBits {
  readonly #input: Uint8Array;
  readonly #base: number;
  /** Bits not yet read; below 0 more were read than there are (as zeros). */
  left: number;

  constructor(input: Uint8Array, start: number, end: number) {
    const last = end > start ? (input[end - 1] as number) : 0;
    if (last === 0) throw damaged('a bit stream has no end mark');
    this.#input = input;
    this.#base = start * 8;
    this.left = (end - start) * 8 - (Math.clz32(last) - 24) - 1;
  }

  /** The next `count` bits, at most 25. */
  read(count: number): number {
    this.left -= count;
    if (this.left < 0) return this.#beyond(count);
    const bit = this.#base + this.left;
    const at = bit >>> 3;
    const input = this.#input;
    const word =
      (input[at] as number) |
      ((input[at + 1] as number) << 8) |
      ((input[at + 2] as number) << 16) |
      ((input[at + 3] as number) << 24);
    return (word >>> (bit & 7)) & ((1 << count) - 1);
  }

  #beyond(count: number): number {
    const there = count + this.left;
    if (there <= 0) return 0;
    const missing = -this.left;
    this.left += missing;
    const bit = this.#base;
    const value = (wordAt(this.#input, bit >>> 3) >>> (bit & 7)) & ((1 << there) - 1);
    this.left -= missing;
    return value << missing;
  }
}

const wordAt = (input: Uint8Array, at: number): number =>
  (input[at] as number) |
  ((input[at + 1] as number) << 8) |
  ((input[at + 2] as number) << 16) |
  ((input[at + 3] as number) << 24);

/** A decoding table of Finite State Entropy (4.1.1): by state the symbol, and how to get to the next state. */
interface FseTable {
  readonly log: number;
  readonly symbols: Uint8Array;
  readonly bits: Uint8Array;
  readonly base: Uint16Array;
}

/** @param counts by symbol; -1: less than one */
function fseTable(counts: readonly number[], log: number): FseTable {
  const size = 1 << log;
  const symbols = new Uint8Array(size);
  const bits = new Uint8Array(size);
  const base = new Uint16Array(size);
  const next = new Uint16Array(counts.length);
  let high = size - 1;
  counts.forEach((count, symbol) => {
    if (count === -1) symbols[high--] = symbol;
    next[symbol] = Math.abs(count);
  });
  const step = (size >>> 1) + (size >>> 3) + 3;
  let position = 0;
  counts.forEach((count, symbol) => {
    for (let index = 0; index < count; index++) {
      symbols[position] = symbol;
      do position = (position + step) & (size - 1);
      while (position > high);
    }
  });
  for (let state = 0; state < size; state++) {
    const symbol = symbols[state] as number;
    const value = next[symbol] as number;
    next[symbol] = value + 1;
    const width = log - (31 - Math.clz32(value));
    bits[state] = width;
    base[state] = (value << width) - size;
  }
  return { log, symbols, bits, base };
}

/** Read the description of a table (4.1.1). */
function readFseTable(
  input: Uint8Array,
  start: number,
  end: number,
  maxLog: number,
  maxSymbol: number,
): { table: FseTable; next: number } {
  let bit = start * 8;
  const peek = (count: number): number => (wordAt(input, bit >>> 3) >>> (bit & 7)) & ((1 << count) - 1);
  const log = peek(4) + 5;
  bit += 4;
  if (log > maxLog) throw damaged(`an entropy table has 2^${log} entries`);
  const counts: number[] = [];
  let remaining = (1 << log) + 1;
  let threshold = 1 << log;
  let width = log + 1;
  while (remaining > 1) {
    if (counts.length > maxSymbol || bit > end * 8) throw damaged('an entropy table has too many symbols');
    const short = 2 * threshold - 1 - remaining;
    let value = peek(width - 1);
    if (value < short) bit += width - 1;
    else {
      value = peek(width);
      if (value >= threshold) value -= short;
      bit += width;
    }
    const count = value - 1;
    remaining -= Math.abs(count);
    counts.push(count);
    if (count === 0) {
      for (let repeat = 3; repeat === 3; ) {
        repeat = peek(2);
        bit += 2;
        for (let index = 0; index < repeat; index++) counts.push(0);
        if (counts.length > maxSymbol + 1 || bit > end * 8) throw damaged('an entropy table has too many symbols');
      }
    }
    while (remaining < threshold) {
      width--;
      threshold >>>= 1;
    }
  }
  const next = Math.ceil(bit / 8);
  if (remaining !== 1 || counts.length > maxSymbol + 1 || next > end) throw damaged('an entropy table is wrong');
  return { table: fseTable(counts, log), next };
}

/** One of the three codes of a sequence (3.1.1.3.2.1). */
interface SequenceCode {
  readonly maxLog: number;
  readonly maxSymbol: number;
  readonly predefined: FseTable;
  /** Extra bits by symbol, and the value they are added to. */
  readonly bits: readonly number[];
  readonly base: readonly number[];
}

/** Bases follow from the bits: the ranges of the symbols adjoin. */
function basesFrom(first: number, bits: readonly number[]): number[] {
  let next = first;
  return bits.map((count) => {
    const base = next;
    next += 2 ** count;
    return base;
  });
}

const zeros = (count: number): number[] => new Array<number>(count).fill(0);
const ones = (count: number): number[] => new Array<number>(count).fill(1);
const LITERAL_LENGTH_BITS = [...zeros(16), 1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
const MATCH_LENGTH_BITS = [...zeros(32), 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];

const LITERAL_LENGTHS: SequenceCode = {
  maxLog: 9,
  maxSymbol: 35,
  predefined: fseTable(
    [4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1, -1, -1, -1, -1],
    6,
  ),
  bits: LITERAL_LENGTH_BITS,
  base: basesFrom(0, LITERAL_LENGTH_BITS),
};
const MATCH_LENGTHS: SequenceCode = {
  maxLog: 9,
  maxSymbol: 52,
  predefined: fseTable([1, 4, 3, 2, 2, 2, 2, 2, 2, ...ones(37), -1, -1, -1, -1, -1, -1, -1], 6),
  bits: MATCH_LENGTH_BITS,
  base: basesFrom(3, MATCH_LENGTH_BITS),
};
/** The symbol itself is the number of extra bits. */
const OFFSET_CODES: SequenceCode = {
  maxLog: 8,
  maxSymbol: 31,
  predefined: fseTable([1, 1, 1, 1, 1, 1, 2, 2, 2, ...ones(15), -1, -1, -1, -1, -1], 5),
  bits: [],
  base: [],
};

const MODE = { PREDEFINED: 0, RLE: 1, FSE: 2 } as const;

function sequenceTable(
  input: Uint8Array,
  cursor: { at: number },
  end: number,
  mode: number,
  code: SequenceCode,
  previous: FseTable | undefined,
): FseTable {
  switch (mode) {
    case MODE.PREDEFINED:
      return code.predefined;
    case MODE.RLE: {
      if (cursor.at >= end) throw damaged(CUT);
      const symbol = input[cursor.at++] as number;
      if (symbol > code.maxSymbol) throw damaged(`a sequence has the code ${symbol}`);
      return { log: 0, symbols: Uint8Array.of(symbol), bits: new Uint8Array(1), base: new Uint16Array(1) };
    }
    case MODE.FSE: {
      const { table, next } = readFseTable(input, cursor.at, end, code.maxLog, code.maxSymbol);
      cursor.at = next;
      return table;
    }
    default:
      if (previous === undefined) throw damaged('the first block repeats a table');
      return previous;
  }
}

/** By the next `log` bits: the symbol, and how many of the bits are its code. */
interface HuffmanTable {
  readonly log: number;
  readonly symbols: Uint8Array;
  readonly bits: Uint8Array;
}

const MAX_HUFFMAN_LOG = 11;
const MAX_WEIGHT_LOG = 6;

/** 4.2.1 */
function readHuffmanTable(input: Uint8Array, start: number, end: number): { table: HuffmanTable; next: number } {
  if (start >= end) throw damaged(CUT);
  const head = input[start] as number;
  const weights: number[] = [];
  let next: number;
  if (head >= 128) {
    const count = head - 127;
    next = start + 1 + Math.ceil(count / 2);
    if (next > end) throw damaged(CUT);
    for (let index = 0; index < count; index++) {
      const pair = input[start + 1 + (index >>> 1)] as number;
      weights.push(index % 2 === 0 ? pair >>> 4 : pair & 15);
    }
  } else {
    next = start + 1 + head;
    if (next > end) throw damaged(CUT);
    readWeights(input, start + 1, next, weights);
  }

  // The last weight is not written: it makes the sum a power of two.
  const sum = weights.reduce((total, weight) => total + (weight === 0 ? 0 : 2 ** (weight - 1)), 0);
  if (sum === 0) throw damaged('a Huffman table is empty');
  const log = 32 - Math.clz32(sum);
  const left = 2 ** log - sum;
  if (log > MAX_HUFFMAN_LOG || (left & (left - 1)) !== 0) throw damaged('a Huffman table is wrong');
  weights.push(32 - Math.clz32(left));

  const symbols = new Uint8Array(1 << log);
  const bits = new Uint8Array(1 << log);
  let at = 0;
  for (let weight = 1; weight <= log; weight++) {
    weights.forEach((of, symbol) => {
      if (of !== weight) return;
      const count = 1 << (weight - 1);
      symbols.fill(symbol, at, at + count);
      bits.fill(log + 1 - weight, at, at + count);
      at += count;
    });
  }
  if (at !== 1 << log) throw damaged('a Huffman table is wrong');
  return { table: { log, symbols, bits }, next };
}

/** Weights by two states in turn, until the bits are used up (4.2.1.2). */
function readWeights(input: Uint8Array, start: number, end: number, weights: number[]): void {
  const { table, next } = readFseTable(input, start, end, MAX_WEIGHT_LOG, 255);
  const bits = new BackwardBits(input, next, end);
  const states = [bits.read(table.log), bits.read(table.log)];
  if (bits.left < 0) throw damaged(CUT);
  for (let turn = 0; ; turn = 1 - turn) {
    const state = states[turn] as number;
    weights.push(table.symbols[state] as number);
    const width = table.bits[state] as number;
    if (bits.left < width) {
      weights.push(table.symbols[states[1 - turn] as number] as number);
      break;
    }
    states[turn] = (table.base[state] as number) + bits.read(width);
    // 256 symbols, the last of which is not written.
    if (weights.length > 254) throw damaged('a Huffman table has too many symbols');
  }
  if (weights.length > 255) throw damaged('a Huffman table has too many symbols');
}

/** One stream of literals to `target[from, to)` (4.2.2). */
function decodeHuffman(
  input: Uint8Array,
  start: number,
  end: number,
  table: HuffmanTable,
  target: Uint8Array,
  from: number,
  to: number,
): void {
  const stream = new BackwardBits(input, start, end);
  const { log, symbols, bits } = table;
  const mask = (1 << log) - 1;
  const base = start * 8;
  let left = stream.left;
  for (let at = from; at < to; at++) {
    // `log` bits ahead; missing ones at the very end are zeros.
    const bit = left - log;
    const word = bit >= 0 ? wordAt(input, (base + bit) >>> 3) >>> ((base + bit) & 7) : wordAt(input, start) << -bit;
    const index = word & mask;
    target[at] = symbols[index] as number;
    left -= bits[index] as number;
    if (left < 0) throw damaged('the literals end too early');
  }
  if (left !== 0) throw damaged('something follows the literals');
}
