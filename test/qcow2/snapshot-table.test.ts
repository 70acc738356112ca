import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { CorruptImage } from '../../src/errors.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import {
  decodeSnapshotTable,
  encodeSnapshotTable,
  newSnapshotEntry,
  readSnapshotTable,
  renamedEntry,
} from '../../src/qcow2/snapshot-table.ts';
import { MemoryStorage } from './memory-storage.ts';

const folder = mkdtempSync(join(tmpdir(), 'vdskfs-snapshots-'));
afterAll(() => rmSync(folder, { recursive: true }));

const CLUSTER = 65536;
const FILE_BYTES = 1 << 20;
const place = (snapshotCount: number) => ({
  snapshotCount,
  snapshotsOffset: 0x50000,
  size: 4096,
  clusterBytes: CLUSTER,
});
const decode = (bytes: Uint8Array, count: number) => decodeSnapshotTable(bytes, place(count), FILE_BYTES, 'disk.qcow2');

/** One entry of the first format: no extra data, ID "1", name "n". */
const oldEntry = Uint8Array.from([
  ...[0, 0, 0, 0, 0, 4, 0, 0], // L1 table at 0x40000
  ...[0, 0, 0, 2], // of two entries
  ...[0, 1, 0, 1], // ID and name of a byte each
  ...[0x5f, 0, 0, 0], // seconds
  ...[0, 0, 0, 7], // nanoseconds
  ...[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], // guest clock
  ...[0, 0, 0, 9], // bytes of VM state
  ...[0, 0, 0, 0], // no extra data
  ...[0x31, 0x6e], // "1", "n"
  ...[0, 0, 0, 0, 0, 0], // padding to 48
]);

describe('a snapshot table entry', () => {
  it('without extra data has the disk size of the image', () => {
    expect(decode(oldEntry, 1)).toMatchObject({
      bytes: 48,
      entries: [
        {
          l1TableOffset: 0x40000,
          l1Entries: 2,
          id: '1',
          name: 'n',
          seconds: 0x5f00_0000,
          nanoseconds: 7,
          vmClockNs: 0xffff_ffff_ffff_ffffn,
          vmStateSize: 9,
          virtualSize: 4096,
          icount: undefined,
          problem: undefined,
        },
      ],
    });
  });

  it('is completed when written: its disk size no longer follows the image', () => {
    const again = decode(encodeSnapshotTable(decode(oldEntry, 1)!.entries), 1)!.entries[0]!;
    expect(again).toMatchObject({ vmStateSize: 9, virtualSize: 4096, icount: 0xffff_ffff_ffff_ffffn });
    expect(again.extraData.length).toBe(24);
  });

  it('keeps the unknown tail of its extra data byte for byte', () => {
    const tail = Uint8Array.from({ length: 1000 }, (_, index) => index);
    const entry = { ...newEntry('a'), extraData: Uint8Array.from([...new Uint8Array(24), ...tail]) };
    expect(decode(encodeSnapshotTable([entry]), 1)!.entries[0]!.extraData.slice(24)).toEqual(tail);
  });

  it('shows VM state over 4 GiB as none in the 32-bit field', () => {
    const bytes = encodeSnapshotTable([{ ...newEntry('a'), vmStateSize: 2 ** 32 + 1 }]);
    expect(new DataView(bytes.buffer).getUint32(32)).toBe(0);
    expect(decode(bytes, 1)!.entries[0]!.vmStateSize).toBe(2 ** 32 + 1);
  });

  it('keeps a name that is no UTF-8, until it is renamed', () => {
    const entry = { ...newEntry('a'), nameRaw: Uint8Array.of(0xff, 0x41) };
    const again = decode(encodeSnapshotTable([entry]), 1)!.entries[0]!;
    expect([again.name, again.nameRaw]).toEqual(['\ufffdA', Uint8Array.of(0xff, 0x41)]);
    expect(decode(encodeSnapshotTable([renamedEntry(again, 'ß')]), 1)!.entries[0]!.name).toBe('ß');
  });

  it.each([
    ['an unaligned L1 table', { l1TableOffset: 0x40200 }, 'not aligned'],
    ['an L1 table over 32 MiB', { l1Entries: 2 ** 22 + 1 }, 'at most 4194304'],
    ['an L1 table in the header', { l1TableOffset: 0 }, 'where the header is'],
    ['an L1 table past the end', { l1TableOffset: FILE_BYTES }, 'passes the end of the file'],
  ])('with %s is listed with its problem', (_rule, change, expected) => {
    const table = decode(encodeSnapshotTable([{ ...newEntry('a'), ...change }, newEntry('b')]), 2)!;
    expect(table.entries[0]!.problem).toContain(expected);
    expect(table.entries[1]!.problem).toBeUndefined();
  });

  it.each([
    ['extra data over 1 KiB', 36, [0, 0, 4, 1], 'extra_data_size is 1025'],
    ['an L1 table above 2^53', 0, [0x7f], 'l1_table_offset'],
    ['a disk above 2^53 bytes', 48, [0x7f], 'virtual disk size'],
    ['VM state above 2^53 bytes', 40, [0x7f], 'vm_state_size'],
  ])('with %s is refused', (_rule, at, bytes, expected) => {
    const table = encodeSnapshotTable([newEntry('a')]);
    table.set(bytes, at);
    expect(() => decode(table, 1)).toThrow(expected);
    expect(() => decode(table, 1)).toThrow(CorruptImage);
  });
});

const newEntry = (name: string) =>
  newSnapshotEntry({
    l1TableOffset: 0x40000,
    l1Entries: 1,
    id: '7',
    name,
    seconds: 1,
    nanoseconds: 2,
    virtualSize: 512,
  });

describe('the snapshot table', () => {
  it('comes back as it was written, whatever the lengths of names and extra data', () => {
    const entry = fc.record({
      name: fc.string({ unit: 'binary', maxLength: 40 }),
      extra: fc.uint8Array({ minLength: 24, maxLength: 40 }),
      vmClockNs: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
      vmStateSize: fc.maxSafeNat(),
    });
    fc.assert(
      fc.property(fc.array(entry, { maxLength: 5 }), (list) => {
        const entries = list.map(({ name, extra, ...rest }) => ({
          ...newEntry(name),
          ...rest,
          icount: 5n,
          extraData: extra,
        }));
        const bytes = encodeSnapshotTable(entries);
        const table = decode(bytes, entries.length)!;
        expect(table.bytes).toBe(bytes.length);
        expect(
          table.entries.map(({ nameRaw, vmClockNs, vmStateSize }) => ({ nameRaw, vmClockNs, vmStateSize })),
        ).toEqual(entries.map(({ nameRaw, vmClockNs, vmStateSize }) => ({ nameRaw, vmClockNs, vmStateSize })));
        expect(encodeSnapshotTable(table.entries)).toEqual(bytes);
      }),
    );
  });

  it('asks for more bytes when the last entry is cut', () => {
    const bytes = encodeSnapshotTable([newEntry('a'), newEntry('b')]);
    expect(decode(bytes.subarray(0, bytes.length - 16), 2)).toBeUndefined();
  });

  it('that claims more entries than the file holds is refused', () => {
    const path = join(folder, 'short.qcow2');
    execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', path, '1M']);
    execFileSync('qemu-img', ['snapshot', '-c', 'one', path]);
    const storage = MemoryStorage.load(path);
    const header = readHeader(storage);
    // The bytes behind the one entry are zeros: entries without a name. Only the end of the file stops them.
    expect(() => readSnapshotTable(storage, { ...header, snapshotCount: 65536 })).toThrow('pass the end of the file');
  });

  it('of qemu-img is read, also when it is longer than the first read', () => {
    const path = join(folder, 'many.qcow2');
    execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', path, '1M']);
    for (const name of ['first', 'x'.repeat(255), 'Grüße/ä']) execFileSync('qemu-img', ['snapshot', '-c', name, path]);
    const storage = MemoryStorage.load(path);
    const header = readHeader(storage);
    const { entries } = readSnapshotTable(storage, header);
    expect(entries.map(({ id, name }) => [id, name])).toEqual([
      ['1', 'first'],
      ['2', 'x'.repeat(255)],
      ['3', 'Grüße/ä'],
    ]);

    const many = Array.from({ length: 2000 }, (_, index) => ({
      ...entries[1]!,
      id: `${index}`,
      idRaw: Buffer.from(`${index}`),
    }));
    const bytes = encodeSnapshotTable(many);
    storage.write(bytes, 0, bytes.length, 1 << 24);
    const table = readSnapshotTable(storage, { ...header, snapshotCount: 2000, snapshotsOffset: 1 << 24 });
    expect(table.bytes).toBe(bytes.length);
    expect(table.entries[1999]!.id).toBe('1999');
  });
});
