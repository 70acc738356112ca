/**
 * Fixed-layout structures, described once as data: a table of fields gives offsets, decoder and encoder.
 * Used for everything that crosses a byte boundary: the qcow2 file (big endian) and the FUSE device (little endian).
 */

/** One field's width and how its value goes in and out of a view. */
interface Field<T> {
  readonly bytes: number;
  get(view: DataView, offset: number, littleEndian: boolean): T;
  set(view: DataView, offset: number, value: T, littleEndian: boolean): void;
}

export const u8: Field<number> = {
  bytes: 1,
  get: (view, offset) => view.getUint8(offset),
  set: (view, offset, value) => view.setUint8(offset, value),
};

export const u16: Field<number> = {
  bytes: 2,
  get: (view, offset, little) => view.getUint16(offset, little),
  set: (view, offset, value, little) => view.setUint16(offset, value, little),
};

export const u32: Field<number> = {
  bytes: 4,
  get: (view, offset, little) => view.getUint32(offset, little),
  set: (view, offset, value, little) => view.setUint32(offset, value, little),
};

export const i32: Field<number> = {
  bytes: 4,
  get: (view, offset, little) => view.getInt32(offset, little),
  set: (view, offset, value, little) => view.setInt32(offset, value, little),
};

/** All 64 bits, as a bigint: feature masks, opaque identifiers, and sizes still to be checked. */
export const u64: Field<bigint> = {
  bytes: 8,
  get: (view, offset, little) => view.getBigUint64(offset, little),
  set: (view, offset, value, little) => view.setBigUint64(offset, value, little),
};

export const i64: Field<bigint> = {
  bytes: 8,
  get: (view, offset, little) => view.getBigInt64(offset, little),
  set: (view, offset, value, little) => view.setBigInt64(offset, value, little),
};

/** `bytes` characters of one byte each, filled up with NULs, which `get` leaves out. @throws RangeError if it does not fit */
export const latin1 = (bytes: number): Field<string> => ({
  bytes,
  get: (view, offset) =>
    Buffer.from(view.buffer, view.byteOffset + offset, bytes)
      .toString('latin1')
      .replace(/\0+$/, ''),
  set: (view, offset, value) => {
    if (value.length > bytes) throw new RangeError(`'${value}' has more than ${bytes} bytes`);
    const target = Buffer.from(view.buffer, view.byteOffset + offset, bytes);
    target.fill(0).write(value, 'latin1');
  },
});

type Fields = Readonly<Record<string, Field<number> | Field<bigint> | Field<string>>>;
type ValueOf<F> = F extends Field<infer T> ? T : never;

/** The decoded form of a record. */
export type RecordOf<R> = R extends RecordCodec<infer F> ? { -readonly [K in keyof F]: ValueOf<F[K]> } : never;

export interface RecordCodec<F extends Fields> {
  readonly name: string;
  /** Size of the whole structure in bytes. */
  readonly bytes: number;
  /** Byte offset of each field from the start of the structure. */
  readonly at: { readonly [K in keyof F]: number };
  /** @throws RangeError if fewer than `bytes` bytes follow `offset` */
  decode(source: Uint8Array, offset?: number): { -readonly [K in keyof F]: ValueOf<F[K]> };
  /** Fields left out are written as zero. */
  encode(value: { readonly [K in keyof F]?: ValueOf<F[K]> }, target?: Uint8Array, offset?: number): Uint8Array;
}

function define<F extends Fields>(name: string, bytes: number, fields: F, little: boolean): RecordCodec<F> {
  const at: Record<string, number> = {};
  let end = 0;
  for (const [key, field] of Object.entries(fields)) {
    at[key] = end;
    end += field.bytes;
  }
  if (end !== bytes) throw new Error(`${name}: the fields add up to ${end} bytes, the structure has ${bytes}`);
  return {
    name,
    bytes,
    at: at as { [K in keyof F]: number },
    decode(source, offset = 0) {
      const view = new DataView(source.buffer, source.byteOffset + offset, bytes);
      const value: Record<string, number | bigint | string> = {};
      for (const [key, field] of Object.entries(fields)) value[key] = field.get(view, at[key] as number, little);
      return value as { -readonly [K in keyof F]: ValueOf<F[K]> };
    },
    encode(value, target = new Uint8Array(bytes), offset = 0) {
      const view = new DataView(target.buffer, target.byteOffset + offset, bytes);
      for (const [key, field] of Object.entries(fields)) {
        const given = value[key as keyof F] as number | bigint | string | undefined;
        if (given !== undefined) (field as Field<typeof given>).set(view, at[key] as number, given, little);
        else target.fill(0, offset + (at[key] as number), offset + (at[key] as number) + field.bytes);
      }
      return target;
    },
  };
}

/** A structure in the byte order of the qcow2 file. `bytes` is checked against the fields when the module loads. */
export const bigEndian = <F extends Fields>(name: string, bytes: number, fields: F): RecordCodec<F> =>
  define(name, bytes, fields, false);

/** A structure in the byte order of the supported hosts (x86-64 and arm64), as the FUSE device speaks it. */
export const littleEndian = <F extends Fields>(name: string, bytes: number, fields: F): RecordCodec<F> =>
  define(name, bytes, fields, true);
