/** What a snapshot table entry keeps of a checkpoint: read back as it was, and harmless whatever another program left there. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { decodeGuest, decodeRecord, encodeDetails, encodeRecord } from '../../src/disk/checkpoint-record.ts';
import { MAX_APPLICATION_BYTES } from '../../src/qcow2/snapshot-table.ts';

const guest = {
  kind: 'qemu',
  name: 'vm1',
  version: '7.2',
  hostRelease: undefined,
  argv: ['qemu', '-m', '1G'],
} as const;
const files = [
  { name: 'state', offset: 65536, bytes: 2 ** 40, allocatedBytes: 2 ** 30 },
  { name: 'state.meta', offset: 65536 + 2 ** 40 + 512, bytes: 7, allocatedBytes: 7 },
];
const vmStateBytes = 2 ** 41;

describe('a checkpoint record', () => {
  it('is read back', () => {
    const bytes = encodeRecord({ consistency: 'memory', guest }, files) as Uint8Array;
    expect(decodeRecord(bytes, vmStateBytes)).toEqual({ consistency: 'memory', guest, files, guestInArchive: false });
  });

  it('is not needed where there is nothing to say', () => {
    expect(encodeRecord({ consistency: 'crash' }, [])).toBe(undefined);
    const none = { guest: undefined, files: [], guestInArchive: false };
    expect(decodeRecord(new Uint8Array(), 0)).toEqual({ consistency: 'crash', ...none });
    // Taken by QEMU.
    expect(decodeRecord(new Uint8Array(), 1000)).toEqual({ consistency: 'memory', ...none });
  });

  it('says where the guest is when there is no room for it', () => {
    const talkative = { ...guest, argv: ['x'.repeat(2000)] };
    const bytes = encodeRecord({ consistency: 'memory', guest: talkative }, files) as Uint8Array;
    expect(bytes.length).toBeLessThanOrEqual(MAX_APPLICATION_BYTES);
    expect(decodeRecord(bytes, vmStateBytes)).toMatchObject({ guest: undefined, guestInArchive: true, files });
    expect(decodeGuest(encodeDetails({ consistency: 'memory', guest: talkative }, 0, 64_000))).toEqual(talkative);
    expect(decodeGuest(encodeDetails({ consistency: 'memory', guest: talkative }, 0, 1000))).toEqual({
      ...guest,
      argv: [],
    });
  });

  it('does not believe files that pass the end, have other names, or the same', () => {
    const decode = (value: unknown): unknown =>
      decodeRecord(Buffer.from(JSON.stringify({ vdskfs: 1, consistency: 'memory', files: value })), 1000).files;
    expect(decode([['state', 0, 1000]])).toHaveLength(1);
    for (const wrong of [
      [['state', 1, 1000]],
      [['state', -1, 10]],
      [['state', 0, 1.5]],
      [['state', 0, 2 ** 60]],
      [['../state', 0, 1]],
      [
        ['state', 0, 1],
        ['state', 1, 1],
      ],
      [['state']],
      'state',
      [null],
    ]) {
      expect(decode(wrong)).toEqual([]);
    }
  });

  it('takes any bytes', () => {
    fc.assert(
      fc.property(
        fc.oneof(
          fc.uint8Array(),
          fc.json().map((text) => Buffer.from(text)),
        ),
        fc.nat(),
        (bytes, size) => {
          const { files: found } = decodeRecord(bytes, size);
          for (const { offset, bytes: length } of found) expect(offset + length).toBeLessThanOrEqual(size);
        },
      ),
    );
  });
});
