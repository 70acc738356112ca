/**
 * L1 tables of snapshots that readers have in memory: who moves an L2 table changes them, too. They are forgotten with
 * the memory that they are in, so that nobody has to close them.
 */
import type { Storage } from '../storage/storage.ts';
import type { Image } from './image.ts';
import type { L1Table } from './lookup.ts';

interface Known {
  /** Host offset of the table that this is a copy of. */
  offset: number;
  readonly memory: WeakRef<ArrayBufferLike>;
  readonly entries: number;
}

/** By the image's file: the image over it may be made anew while views are open. */
const known = new WeakMap<Storage, Known[]>();

export function noteOpenTable(image: Image, offset: number, { view, entries }: L1Table): void {
  const tables = (known.get(image.file) ?? []).filter(({ memory }) => memory.deref() !== undefined);
  tables.push({ offset, memory: new WeakRef(view.buffer), entries });
  known.set(image.file, tables);
}

/** Copies of the table at `offset`. Change them with the mutex held. */
export function* openTablesAt(image: Image, offset: number): Generator<Pick<L1Table, 'view' | 'entries'>> {
  for (const { offset: at, memory, entries } of known.get(image.file) ?? []) {
    const buffer = memory.deref();
    if (at === offset && buffer !== undefined) yield { view: new DataView(buffer), entries };
  }
}

/** The table itself is somewhere else now. */
export function moveOpenTables(image: Image, offset: number, to: number): void {
  for (const table of known.get(image.file) ?? []) if (table.offset === offset) table.offset = to;
}
