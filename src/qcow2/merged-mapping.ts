/**
 * One mapping for a run of layers that do not change: for each piece of the disk, which layer's file has it, and where.
 * A read costs one look-up however many layers there are. It is filled as it is asked, from the tables of the layers, in
 * memory that all threads share; when the layers change, whoever changes them makes a new one.
 *
 * A piece that is not all in one place (a layer has smaller clusters, or ends inside) is looked up layer by layer.
 */
import { FsError } from '../errors.ts';
import type { Storage } from '../storage/storage.ts';
import type { FrozenImage, FrozenLayer } from './frozen-layer.ts';
import { dataHost, unitKind } from './frozen-layer.ts';
import type { Geometry } from './geometry.ts';
import type { Backing } from './image.ts';
import { kind } from './l2-entry.ts';
import { lock, unlock } from './mutex.ts';
import { cacheBytes, SliceCache } from './slice-cache.ts';

/** Where a piece is; 0: no layer has it. */
const place = { BELOW: 0, ZERO: 1, DATA: 2, COMPRESSED: 3, MIXED: 4 } as const;

/**
 * An entry is two words: the place (3 bits), the layer (8 bits at 16), and for DATA the host offset in sectors (44 bits,
 * the upper 12 in the first word).
 */
const PLACE_SHIFT = 29;
const LAYER_SHIFT = 16;
const LAYER_MASK = 0xff;
const HOST_HIGH_MASK = 0xfff;
const SECTOR_BYTES = 512;
export const MAX_LAYERS = LAYER_MASK + 1;

const SLICE_BYTES = 4096;
const SLICE_ENTRIES = SLICE_BYTES / 8;
/** Smaller clusters do not make the pieces smaller: the map would grow too large. */
const MIN_PIECE_BYTES = 4096;
const MIN_SLOTS = 8;
const MUTEX = 0;
const WORDS_BYTES = 64;

/** A mapping as plain data, for other threads; the layers go with it in their order. */
export interface SharedMapping {
  readonly memory: SharedArrayBuffer;
  /** Bytes of the disk that an entry stands for. */
  readonly pieceBytes: number;
  readonly slots: number;
}

/**
 * Memory for the mapping of `layers`.
 * @param geometries of those layers that are images
 * @param size bytes of the top layer's disk
 * @param mostBytes for the map; pages that nobody asks for cost nothing
 */
export function createMapping(geometries: readonly Geometry[], size: number, mostBytes: number): SharedMapping {
  const smallest = Math.min(2 ** 21, ...geometries.map(({ unitBytes }) => unitBytes));
  const pieceBytes = Math.max(MIN_PIECE_BYTES, smallest);
  const wanted = Math.ceil(size / (pieceBytes * SLICE_ENTRIES)) + 1;
  const slots = Math.max(MIN_SLOTS, Math.min(wanted, Math.floor(mostBytes / SLICE_BYTES)));
  const memory = new SharedArrayBuffer(WORDS_BYTES + cacheBytes(slots, SLICE_BYTES));
  return { memory, pieceBytes, slots };
}

/** A thread's object over a mapping. */
export class MergedLayers implements Backing {
  readonly #layers: readonly FrozenLayer[];
  readonly #below: Backing | undefined;
  readonly #size: number;
  readonly #pieceBytes: number;
  readonly #spanBytes: number;
  readonly #words: Int32Array;
  readonly #slices: SliceCache;
  /** The slices as words. */
  readonly #entries: Uint32Array;
  /** L2 entries on their way into the map. */
  readonly #raw: Uint8Array;
  readonly #rawView: DataView;
  readonly #rawWords: Uint32Array;
  /** What `#find` found: the place, for how many bytes, and for DATA where. */
  readonly #run = { place: 0, layer: 0, host: 0, length: 0 };
  /** One decompressed cluster: of which layer, at which guest offset. */
  readonly #decompressed = { layer: -1, start: 0, bytes: new Uint8Array(0) };

  /**
   * @param layers top first
   * @param below what is below the last of them; undefined: nothing
   */
  constructor(shared: SharedMapping, layers: readonly FrozenLayer[], below: Backing | undefined) {
    if (layers.length > MAX_LAYERS) throw new Error(`${layers.length} layers in one mapping`);
    this.#layers = layers;
    this.#below = below;
    this.#size = layers[0]?.size ?? 0;
    this.#pieceBytes = shared.pieceBytes;
    this.#spanBytes = shared.pieceBytes * SLICE_ENTRIES;
    this.#words = new Int32Array(shared.memory, 0, WORDS_BYTES / 4);
    const { memory, slots } = shared;
    this.#slices = new SliceCache(
      { memory, byteOffset: WORDS_BYTES, slots, sliceBytes: SLICE_BYTES, content: 'mapping', mayWriteAnyTime: false },
      this.#source(),
    );
    const { byteOffset, byteLength } = this.#slices.bytes;
    this.#entries = new Uint32Array(memory, byteOffset, byteLength / 4);
    const perPiece = Math.max(
      1,
      ...layers.map(({ image }) => shared.pieceBytes / (image?.geometry.clusterBytes ?? Infinity)),
    );
    this.#raw = new Uint8Array(SLICE_ENTRIES * perPiece * 16);
    this.#rawView = new DataView(this.#raw.buffer);
    this.#rawWords = new Uint32Array(this.#raw.buffer);
  }

  size(): number {
    return this.#size;
  }

  read(target: Uint8Array, at: number, length: number, offset: number): void {
    const run = this.#run;
    let left = length;
    let to = at;
    let from = offset;
    while (left > 0) {
      this.#find(from, left);
      const count = run.length;
      switch (run.place) {
        case place.DATA: {
          const got = (this.#layers[run.layer] as FrozenLayer).data.read(target, to, count, run.host);
          if (got < count) target.fill(0, to + got, to + count);
          break;
        }
        case place.ZERO:
          target.fill(0, to, to + count);
          break;
        case place.BELOW:
          this.#readBelow(target, to, count, from);
          break;
        case place.COMPRESSED:
          this.#readCompressed(run.layer, target, to, count, from);
          break;
        default:
          this.#walk(target, to, count, from);
      }
      to += count;
      from += count;
      left -= count;
    }
  }

  extentAt(offset: number, length: number): { readonly data: boolean; readonly length: number } {
    // Whoever looks for data far away comes along at the start of a slice.
    if (offset % this.#spanBytes === 0) {
      const { zero, end } = this.#unmapped(offset);
      if (end > offset) {
        const free = Math.min(length, end - offset);
        return zero ? { data: false, length: free } : this.#extentBelow(offset, free);
      }
    }
    const run = this.#run;
    this.#find(offset, length);
    const found = run.length;
    switch (run.place) {
      case place.DATA: {
        const layer = this.#layers[run.layer] as FrozenLayer;
        return layer.image === undefined ? rawExtent(layer.data, offset, found) : { data: true, length: found };
      }
      case place.COMPRESSED:
        return { data: true, length: found };
      case place.ZERO:
        return { data: false, length: found };
      case place.BELOW:
        return this.#extentBelow(offset, found);
      default:
        return this.#extentOfMixed(offset, found);
    }
  }

  /** Find the place of `offset`, and for at most `length` bytes how far it goes. */
  #find(offset: number, length: number): void {
    const run = this.#run;
    const piece = this.#pieceBytes;
    const slice = Math.floor(offset / this.#spanBytes);
    const index = Math.floor((offset - slice * this.#spanBytes) / piece);
    const within = offset % piece;
    const wanted = Math.min(SLICE_ENTRIES, index + Math.ceil((within + length) / piece));
    const entries = this.#entries;
    lock(this.#words, MUTEX);
    try {
      // 0 is the key of an empty slot.
      const at = this.#slices.load((slice + 1) * SLICE_BYTES) / 4;
      const high = entries[at + index * 2] as number;
      const low = entries[at + index * 2 + 1] as number;
      run.place = high >>> PLACE_SHIFT;
      run.layer = (high >>> LAYER_SHIFT) & LAYER_MASK;
      let next = index + 1;
      if (run.place === place.DATA) {
        const host = ((high & HOST_HIGH_MASK) * 2 ** 32 + low) * SECTOR_BYTES;
        run.host = host + within;
        while (next < wanted) {
          const otherHigh = entries[at + next * 2] as number;
          if ((otherHigh ^ high) >>> LAYER_SHIFT !== 0) break;
          const other =
            ((otherHigh & HOST_HIGH_MASK) * 2 ** 32 + (entries[at + next * 2 + 1] as number)) * SECTOR_BYTES;
          if (other !== host + (next - index) * piece) break;
          next++;
        }
      } else if (run.place === place.ZERO || run.place === place.BELOW) {
        while (next < wanted && (entries[at + next * 2] as number) >>> PLACE_SHIFT === run.place) next++;
      }
      run.length = Math.min(length, (next - index) * piece - within);
    } finally {
      unlock(this.#words, MUTEX);
    }
  }

  #readBelow(target: Uint8Array, at: number, length: number, offset: number): void {
    const below = this.#below;
    const there = below === undefined ? 0 : Math.max(0, Math.min(length, below.size() - offset));
    if (there > 0) below?.read(target, at, there, offset);
    if (there < length) target.fill(0, at + there, at + length);
  }

  #extentBelow(offset: number, length: number): { readonly data: boolean; readonly length: number } {
    const inside = this.#below === undefined ? 0 : this.#below.size() - offset;
    if (this.#below === undefined || inside <= 0) return { data: false, length };
    return this.#below.extentAt(offset, Math.min(length, inside));
  }

  /** How far from `offset` on no layer has a table; `zero`: a layer ends before, so that nothing below shows either. */
  #unmapped(offset: number): { readonly zero: boolean; readonly end: number } {
    let end = this.#size;
    for (const { image, size } of this.#layers) {
      if (offset >= size) return { zero: true, end };
      end = Math.min(end, size, image === undefined ? offset : image.unmappedEnd(offset));
      if (end <= offset) break;
    }
    return { zero: false, end };
  }

  #readCompressed(layer: number, target: Uint8Array, at: number, length: number, offset: number): void {
    const image = (this.#layers[layer] as FrozenLayer).image as FrozenImage;
    const { clusterBytes } = image.geometry;
    const start = offset - (offset % clusterBytes);
    const cached = this.#decompressed;
    // Small reads go through a cluster piece by piece: the last one is kept.
    if (cached.layer !== layer || cached.start !== start) {
      cached.layer = -1;
      if (cached.bytes.length !== clusterBytes) cached.bytes = new Uint8Array(clusterBytes);
      image.lookup(start, clusterBytes);
      image.decompress(cached.bytes, start);
      cached.layer = layer;
      cached.start = start;
    }
    target.set(cached.bytes.subarray(offset - start, offset - start + length), at);
  }

  /** Layer by layer: of a piece that is not all in one place. */
  #walk(target: Uint8Array, at: number, length: number, offset: number): void {
    for (let done = 0; done < length; ) {
      done += this.#walkOne(target, at + done, length - done, offset + done);
    }
  }

  /** Read the first part that is all in one place. @returns its bytes */
  #walkOne(target: Uint8Array, at: number, length: number, offset: number): number {
    const found = this.#locate(offset, length);
    switch (found.place) {
      case place.DATA: {
        const { data, image } = found.layer as FrozenLayer;
        const got = data.read(target, at, found.length, image?.extent.host ?? offset);
        if (got < found.length) target.fill(0, at + got, at + found.length);
        break;
      }
      case place.COMPRESSED:
        this.#readCompressed(this.#layers.indexOf(found.layer as FrozenLayer), target, at, found.length, offset);
        break;
      case place.BELOW:
        this.#readBelow(target, at, found.length, offset);
        break;
      default:
        target.fill(0, at, at + found.length);
    }
    return found.length;
  }

  #extentOfMixed(offset: number, length: number): { readonly data: boolean; readonly length: number } {
    const found = this.#locate(offset, length);
    if (found.place === place.BELOW) return this.#extentBelow(offset, found.length);
    if (found.place === place.ZERO) return { data: false, length: found.length };
    const { data, image } = found.layer as FrozenLayer;
    return image === undefined ? rawExtent(data, offset, found.length) : { data: true, length: found.length };
  }

  /** The layer that shows at `offset`. @throws CorruptImage */
  #locate(
    offset: number,
    length: number,
  ): { readonly place: number; readonly layer: FrozenLayer | undefined; readonly length: number } {
    let run = length;
    for (const layer of this.#layers) {
      if (offset >= layer.size) return { place: place.ZERO, layer, length: run };
      run = Math.min(run, layer.size - offset);
      if (layer.image === undefined) return { place: place.DATA, layer, length: run };
      layer.image.lookup(offset, run);
      const { extent } = layer.image;
      run = extent.length;
      if (extent.kind !== kind.UNALLOCATED) return { place: places[extent.kind], layer, length: run };
    }
    return { place: place.BELOW, layer: undefined, length: run };
  }

  /** The mapping as the cache of slices wants it: a file of them, in which slice n is at (n + 1) * SLICE_BYTES. */
  #source(): Pick<Storage, 'path' | 'read' | 'write'> {
    return {
      path: 'the mapping of the layers',
      read: (_target, at, length, position) => {
        this.#fill(at / 4, position / SLICE_BYTES - 1);
        return length;
      },
      write: () => {
        throw new Error('a mapping of frozen layers has no changes');
      },
    };
  }

  /** Make the slice `index` at word `at`, with the mutex held. */
  #fill(at: number, index: number): void {
    const start = index * this.#spanBytes;
    const pieces = Math.min(SLICE_ENTRIES, Math.ceil((this.#size - start) / this.#pieceBytes));
    this.#entries.fill(0, at, at + SLICE_ENTRIES * 2);
    let missing = pieces;
    for (let layer = 0; layer < this.#layers.length && missing > 0; layer++) {
      missing -= this.#fillFrom(layer, at, start, pieces);
    }
  }

  /** Enter what a layer has of the pieces that none above it has. @returns how many came to be known */
  #fillFrom(layer: number, at: number, start: number, pieces: number): number {
    const { size, image } = this.#layers[layer] as FrozenLayer;
    const piece = this.#pieceBytes;
    /** Pieces that lie inside the layer's disk, as far as anyone asks. */
    const whole = size >= this.#size ? pieces : clamp(Math.floor((size - start) / piece), pieces);
    let known = 0;
    for (let index = whole; index < pieces; index++) {
      if (this.#entries[at + index * 2] !== 0) continue;
      const ends = start + index * piece < size;
      this.#entries[at + index * 2] = ((ends ? place.MIXED : place.ZERO) << PLACE_SHIFT) >>> 0;
      known++;
    }
    if (image !== undefined) return known + this.#fillFromImage(layer, image, at, start, whole);
    for (let index = 0; index < whole; index++) {
      if (this.#entries[at + index * 2] === 0) known += this.#enterData(layer, at + index * 2, start + index * piece);
    }
    return known;
  }

  /** The same for the first `pieces` of the slice, one L2 table after the other. */
  #fillFromImage(layer: number, image: FrozenImage, at: number, start: number, pieces: number): number {
    const { clusterBytes, l2SpanBytes, l2EntryBytes } = image.geometry;
    const piece = this.#pieceBytes;
    const entries = this.#entries;
    const words = this.#rawWords;
    const entryWords = l2EntryBytes / 4;
    const pieceWords = Math.max(1, piece / clusterBytes) * entryWords;
    const end = start + pieces * piece;
    let known = 0;
    for (let position = start; position < end; ) {
      const l1Index = Math.floor(position / l2SpanBytes);
      const tableStart = l1Index * l2SpanBytes;
      const tableEnd = Math.min(end, tableStart + l2SpanBytes);
      const first = Math.floor((position - tableStart) / clusterBytes);
      const count = Math.ceil((tableEnd - tableStart) / clusterBytes) - first;
      let read = 0;
      let damaged = false;
      try {
        const table = image.l2Table(l1Index);
        if (table !== 0) read = image.readEntries(table, first, count, this.#raw);
        damaged = table !== 0 && read < count;
      } catch (error) {
        if (!(error instanceof FsError)) throw error;
        damaged = true;
      }
      // A piece never begins in one table and ends in another: both are powers of two.
      const lastPiece = Math.ceil((tableEnd - start) / piece);
      const base = tableStart + first * clusterBytes;
      for (let index = (position - start) / piece; index < lastPiece && (damaged || read > 0); index++) {
        if (entries[at + index * 2] !== 0) continue;
        const guest = start + index * piece;
        if (damaged) {
          known += this.#enter(layer, at + index * 2, place.MIXED);
          continue;
        }
        // Most entries are zeros in a long chain.
        let word = Math.floor((guest - base) / clusterBytes) * entryWords;
        const end = word + pieceWords;
        while (word < end && words[word] === 0) word++;
        if (word < end) known += this.#enterPiece(layer, image, at + index * 2, guest, base);
      }
      position = tableEnd;
    }
    return known;
  }

  /** Enter one piece, whose L2 entries are in `#raw`, which begins at the guest offset `base`. @returns 1 if the layer has it */
  #enterPiece(layer: number, image: FrozenImage, word: number, guest: number, base: number): number {
    const { geometry } = image;
    const { clusterBytes, unitBytes, l2EntryBytes } = geometry;
    const view = this.#rawView;
    let firstKind: number = kind.UNALLOCATED;
    let firstHost = 0;
    try {
      for (let position = guest; position < guest + this.#pieceBytes; position += unitBytes) {
        const within = position % clusterBytes;
        const entry = ((position - within - base) / clusterBytes) * l2EntryBytes;
        const found = unitKind(geometry, view, entry, Math.floor(within / unitBytes));
        let host = 0;
        if (found === kind.DATA) {
          const high = view.getUint32(entry);
          host = dataHost(geometry, image.data.path, high, view.getUint32(entry + 4), position) + within;
        }
        if (position === guest) {
          firstKind = found;
          firstHost = host;
        } else if (found !== firstKind || (found === kind.DATA && host !== firstHost + (position - guest))) {
          return this.#enter(layer, word, place.MIXED);
        }
      }
    } catch (error) {
      // Nonsense in a table is told to whoever reads that piece.
      if (!(error instanceof FsError)) throw error;
      return this.#enter(layer, word, place.MIXED);
    }
    if (firstKind === kind.UNALLOCATED) return 0;
    if (firstKind === kind.DATA) return this.#enterData(layer, word, firstHost);
    const several = firstKind === kind.COMPRESSED && clusterBytes < this.#pieceBytes;
    return this.#enter(layer, word, several ? place.MIXED : places[firstKind as 1 | 3]);
  }

  #enter(layer: number, word: number, what: number): 1 {
    this.#entries[word] = ((what << PLACE_SHIFT) | (layer << LAYER_SHIFT)) >>> 0;
    return 1;
  }

  #enterData(layer: number, word: number, host: number): 1 {
    const sectors = host / SECTOR_BYTES;
    this.#enter(layer, word, place.DATA);
    this.#entries[word] = ((this.#entries[word] as number) | Math.floor(sectors / 2 ** 32)) >>> 0;
    this.#entries[word + 1] = sectors >>> 0;
    return 1;
  }
}

/** By what an L2 entry says. */
const places = {
  [kind.UNALLOCATED]: place.BELOW,
  [kind.ZERO]: place.ZERO,
  [kind.DATA]: place.DATA,
  [kind.COMPRESSED]: place.COMPRESSED,
} as const;

const clamp = (value: number, most: number): number => Math.max(0, Math.min(value, most));

function rawExtent(file: Storage, offset: number, length: number): { readonly data: boolean; readonly length: number } {
  const start = file.nextData(offset);
  if (start !== offset) return { data: false, length: start < 0 ? length : Math.min(length, start - offset) };
  return { data: true, length: Math.min(length, file.nextHole(offset) - offset) };
}
