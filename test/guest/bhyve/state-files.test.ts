import { describe, expect, it } from 'vitest';
import { FsError } from '../../../src/errors.ts';
import { parseMeta, validateStateFiles } from '../../../src/guest/bhyve/state-files.ts';
import type { StateFile } from '../../../src/guest/guest.ts';

const MEMORY = 1 << 20;
const KERN = 1688;

/** As FreeBSD 14 writes it. */
const current = {
  'basic metadata': { ncpus: 2, vmname: 'web0', memsize: MEMORY, memflags: 0 },
  kern_structs: [
    { device: 'vhpet', size: 328, file_offset: 0 },
    { device: 'vm', size: 96, file_offset: 328 },
  ],
  devices: [
    { device: 'virtio-blk@pci.0.3.0', size: 1204, file_offset: 424 },
    { device: 'atkbdc', size: 60, file_offset: 1628 },
  ],
};

/** As FreeBSD 13 writes it. */
const old = {
  'basic metadata': current['basic metadata'],
  structs: current.kern_structs.map(({ device, ...rest }, index) => ({
    debug_name: device,
    snapshot_req: index,
    ...rest,
  })),
  devices: current.devices.map(({ device, ...rest }) => ({ snapshot_req: device, ...rest })),
};

const file = (name: string, bytes: number, text = ''): StateFile => ({ name, bytes, read: () => Buffer.from(text) });

function files(meta: unknown, { memory = MEMORY, kern = KERN } = {}): StateFile[] {
  const text = typeof meta === 'string' ? meta : JSON.stringify(meta, null, 2);
  return [file('state', memory), file('state.kern', kern), file('state.meta', text.length, text)];
}

describe('state files that fit together', () => {
  it.each([
    ['of FreeBSD 14', current],
    ['of FreeBSD 13', old],
    ['with numbers as strings', { ...current, 'basic metadata': { memsize: String(MEMORY) } }],
    [
      'with a device that has no state',
      { ...current, devices: [...current.devices, { device: 'x', size: 0, file_offset: KERN }] },
    ],
  ])('%s are taken', (_what, meta) => {
    validateStateFiles(files(meta));
  });

  it('may come in any order and under any name', () => {
    validateStateFiles(
      files(current)
        .reverse()
        .map((one) => ({ ...one, read: one.read, name: one.name.replace('state', 'web0.ckp') })),
    );
  });
});

describe('state files that do not', () => {
  const device = (change: object) => ({ ...current, devices: [{ ...current.devices[0], ...change }] });

  it.each<[string, StateFile[], string]>([
    [
      'too little memory',
      files(current, { memory: MEMORY - 1 }),
      `has ${MEMORY - 1} bytes, and the guest has ${MEMORY}`,
    ],
    ['too much memory', files(current, { memory: MEMORY + 4096 }), 'bytes of memory'],
    ['no memory', files(current, { memory: 0 }), 'state is empty'],
    ['devices cut off', files(current, { kern: KERN - 1 }), "'atkbdc' ends at byte 1688 of state.kern, which has 1687"],
    ['devices not described', files(current, { kern: KERN + 1 }), 'has 1689 bytes, of which 1688 are described'],
    ['no devices at all', files(current, { kern: 0 }), 'state.kern is empty'],
    ['an empty description', files(''), 'state.meta is empty'],
    ['a description that is cut off', files(JSON.stringify(current).slice(0, -1)), 'state.meta is no JSON'],
    ['nonsense', files('\0\x01\x02'), 'state.meta is no JSON'],
    ['an array', files([]), 'state.meta is missing'],
    ['null', files('null'), 'state.meta is missing'],
    ['no basics', files({ ...current, 'basic metadata': undefined }), "'basic metadata' of state.meta is missing"],
    ['no size', files({ ...current, 'basic metadata': {} }), "'memsize' of state.meta is no size"],
    ['no list of devices', files({ ...current, devices: undefined }), "'devices' of state.meta is missing"],
    [
      'no list of structures',
      files({ ...current, kern_structs: undefined }),
      "'kern_structs' of state.meta is missing",
    ],
    ['a device that is none', files({ ...current, devices: [7] }), "entry 0 of 'devices' of state.meta is missing"],
    ['a negative offset', files(device({ file_offset: -1 })), "'file_offset' of 'virtio-blk@pci.0.3.0' is no size: -1"],
    ['a broken size', files(device({ size: 1.5 })), 'is no size: 1.5'],
    ['a huge size', files(device({ size: 2 ** 60 })), 'is no size'],
    ['a size in words', files(device({ size: 'all' })), 'is no size: "all"'],
    ['one file only', files(current).slice(0, 1), 'the file that ends in .kern is missing'],
    ['no memory file', files(current).slice(1), 'the memory file is missing'],
    [
      'an endless description',
      [...files(current).slice(0, 2), file('state.meta', 2 ** 40)],
      'far more than it ever needs',
    ],
  ])('%s: refused', (_what, given, why) => {
    expect(() => validateStateFiles(given)).toThrow(FsError);
    expect(() => validateStateFiles(given)).toThrow(why);
  });
});

it('the description names the VM', () => {
  expect(parseMeta('state.meta', JSON.stringify(current))).toMatchObject({ vmName: 'web0', memoryBytes: MEMORY });
});
