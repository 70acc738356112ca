/**
 * The corpus: every variant of image that the engine must read and write, made on the spot by qemu-img and qemu-io,
 * and in the few places where those cannot, by a change of single bytes. Contents are the same each time.
 */
import { spawnSync } from 'node:child_process';
import { closeSync, mkdtempSync, openSync, readSync, rmSync, truncateSync, writeFileSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import type { SparseModel } from './corpus-model.ts';
import {
  appliedSnapshot,
  convertedDisk,
  convertedSnapshot,
  copySparse,
  mappedDisk,
  qemuImg,
  qemuIo,
  qemuIoKilled,
} from './corpus-qemu.ts';
import { Random } from './corpus-random.ts';

export interface Variant {
  /** Unique in the corpus. */
  readonly name: string;
  /** What is special, in a sentence. */
  readonly what: string;
  /** Features of the format that it uses. */
  readonly features: readonly string[];
  /** How many more checkpoints the format can hold: none with an external data file or 1-bit refcounts. */
  readonly checkpoints: number;
  /** Too large for a host file: only allocated ranges are compared. */
  readonly sparse: boolean;
  /** Snapshots have other virtual sizes than the disk, which `qemu-img convert -l` cannot show. */
  readonly resized: boolean;
  /** The size in the header, where it is no multiple of 512: QEMU shows less. Bytes. */
  readonly headerBytes: number | undefined;
  /** Name of the external data file that must itself read as the disk. */
  readonly rawDataFile: string | undefined;
  /** The format version; 2 cannot change its size while it has snapshots. */
  readonly version: 2 | 3;
  /** Make it in the empty directory, all its files. Returns the path of the image to mount. */
  make(dir: string): string;
}

const KiB = 1024;
const MiB = 1024 * KiB;
const GiB = 1024 * MiB;
const TiB = 1024 * GiB;

type Options = Readonly<Record<string, string | number>>;

/** qemu-img create in `dir`; names in the options are relative to it. */
function create(dir: string, size: number, options: Options = {}, name = 'disk.qcow2'): string {
  const list = Object.entries(options).map(([key, value]) => `${key}=${value}`);
  const path = join(dir, name);
  qemuImg(path, [
    'create',
    '-q',
    '-f',
    'qcow2',
    ...(list.length > 0 ? ['-o', list.join(',')] : []),
    name,
    String(size),
  ]);
  return path;
}

/**
 * Run commands of qemu-io in which $RANDOM and $TEXT stand for files of bytes to write (`write -s`): the first cannot
 * be compressed, the second can. Their lengths are odd, so that no two clusters come out the same.
 */
function edit(image: string, seed: number, commands: readonly string[], run = qemuIo): void {
  const dir = mkdtempSync(join(tmpdir(), 'vdskfs-bytes-'));
  try {
    const random = join(dir, 'random');
    const text = join(dir, 'text');
    writeFileSync(random, new Random(seed).bytes(65_521));
    writeFileSync(
      text,
      new Random(seed + 1).bytes(65_521).map((byte) => 97 + (byte % 7)),
    );
    run(
      image,
      commands.map((command) => command.replace('$RANDOM', random).replace('$TEXT', text)),
    );
  } finally {
    rmSync(dir, { recursive: true });
  }
}

type Kind = 'random' | 'text' | 'fill' | 'zero' | 'zero-unmap' | 'discard';
const EVERY_KIND: readonly Kind[] = ['random', 'random', 'text', 'fill', 'fill', 'zero', 'zero-unmap', 'discard'];

/** Commands that leave full and partly written clusters, holes and zeros all over the disk of `size` bytes. */
function mixture(size: number, cluster: number, seed: number, kinds = EVERY_KIND, count = 24): string[] {
  const random = new Random(seed);
  const commands: string[] = [];
  for (let made = 0; made < count; made++) {
    const longest = Math.min(size, random.pick([cluster, 3 * cluster, Math.max(16 * cluster, 256 * KiB)]), 2 * MiB);
    // Mostly by sectors; now and then any byte.
    const unit = random.below(4) === 0 ? 1 : Math.min(512, size);
    const length = Math.max(Math.floor((1 + random.below(longest)) / unit), 1) * unit;
    const offset = made === 0 ? size - length : Math.floor(random.below(size - length + 1) / unit) * unit;
    const range = `${offset} ${length}`;
    const kind = made === 0 ? 'random' : random.pick(kinds);
    if (kind === 'random') commands.push(`write -q -s $RANDOM ${range}`);
    else if (kind === 'text') commands.push(`write -q -s $TEXT ${range}`);
    else if (kind === 'fill') commands.push(`write -q -P ${1 + random.below(255)} ${range}`);
    else if (kind === 'zero') commands.push(`write -q -z ${range}`);
    else if (kind === 'zero-unmap') commands.push(`write -q -z -u ${range}`);
    else commands.push(`discard -q ${range}`);
  }
  return commands;
}

/** An image with the mixture in it. */
function filled(dir: string, size: number, options: Options = {}, name?: string, seed = 1): string {
  const image = create(dir, size, options, name);
  edit(image, seed, mixture(size, Number(options.cluster_size ?? 64 * KiB), seed));
  return image;
}

/** A raw file of `size` bytes, any number of them, with data all over and holes. */
function rawFile(dir: string, name: string, size: number, seed: number): string {
  const path = join(dir, name);
  writeFileSync(path, '');
  // qemu-io sees whole sectors only: the odd end is cut off afterwards.
  const rounded = Math.ceil(size / 512) * 512;
  truncateSync(path, rounded);
  edit(path, seed, mixture(rounded, 64 * KiB, seed), (image, commands) => qemuIo(image, commands, ['-f', 'raw']));
  truncateSync(path, size);
  return path;
}

const snapshot = (image: string, name: string): string => qemuImg(image, ['snapshot', '-c', name, image]);

/** An image converted from one with compressible data, compressed. */
function compressed(dir: string, size: number, options: Options): string {
  const source = create(dir, size, {}, 'source.qcow2');
  const cluster = Number(options.cluster_size ?? 64 * KiB);
  edit(source, 5, mixture(size, Math.max(cluster, 64 * KiB), 5, ['text', 'text', 'fill', 'random'], 30));
  const list = Object.entries(options).map(([key, value]) => `${key}=${value}`);
  const image = join(dir, 'disk.qcow2');
  qemuImg(image, ['convert', '-c', '-O', 'qcow2', ...(list.length > 0 ? ['-o', list.join(',')] : []), source, image]);
  rmSync(source);
  return image;
}

/** qcow2 over qcow2 … over raw, `depth` files below the image; each layer writes something of its own. */
function chain(dir: string, depth: number, size: number, cluster: (level: number) => number): string {
  rawFile(dir, 'base.raw', size, 7);
  let backing: Options = { backing_file: 'base.raw', backing_fmt: 'raw' };
  for (let level = 1; level <= depth; level++) {
    const name = level === depth ? 'disk.qcow2' : `level${level}.qcow2`;
    const clusterBytes = cluster(level);
    const image = create(dir, size, { cluster_size: clusterBytes, ...backing }, name);
    edit(image, 10 + level, mixture(size, clusterBytes, 10 + level, EVERY_KIND, 8));
    backing = { backing_file: name, backing_fmt: 'qcow2' };
  }
  return join(dir, 'disk.qcow2');
}

/** An overlay over a raw file, with the mixture on top. */
function overlay(dir: string, size: number, options: Options = {}, baseSize = size): string {
  rawFile(dir, 'base.raw', baseSize, 7);
  return filled(dir, size, { backing_file: 'base.raw', backing_fmt: 'raw', ...options });
}

// Byte offsets in the header (qcow2 specification, "General").
const header = {
  BACKING_OFFSET: 8,
  BACKING_LENGTH: 16,
  SIZE: 24,
  SNAPSHOT_COUNT: 60,
  SNAPSHOTS_OFFSET: 64,
  COMPATIBLE: 80,
  AUTOCLEAR: 88,
  LENGTH: 100,
};

function readBytes(path: string, offset: number, length: number): Buffer {
  const fd = openSync(path, 'r');
  try {
    const bytes = Buffer.alloc(length);
    readSync(fd, bytes, 0, length, offset);
    return bytes;
  } finally {
    closeSync(fd);
  }
}

function patchBytes(path: string, offset: number, bytes: Uint8Array): void {
  const fd = openSync(path, 'r+');
  try {
    writeSync(fd, bytes, 0, bytes.length, offset);
  } finally {
    closeSync(fd);
  }
}

function patchU64(path: string, offset: number, change: (old: bigint) => bigint): void {
  const field = readBytes(path, offset, 8);
  field.writeBigUInt64BE(change(field.readBigUInt64BE()));
  patchBytes(path, offset, field);
}

const UNKNOWN_EXTENSION = 0x76647366;

/** Put an extension that nobody knows behind the last one; the backing file's name moves behind it. */
function addUnknownExtension(image: string): void {
  const first = readBytes(image, 0, 4096);
  const name = first
    .subarray(Number(first.readBigUInt64BE(header.BACKING_OFFSET)))
    .subarray(0, first.readUInt32BE(header.BACKING_LENGTH));
  let at = first.readUInt32BE(4) === 2 ? 72 : first.readUInt32BE(header.LENGTH);
  while (first.readUInt32BE(at) !== 0) at += 8 + Math.ceil(first.readUInt32BE(at + 4) / 8) * 8;
  const extension = Buffer.alloc(8 + 24 + 8); // 21 bytes of data are padded to 24; then the end marker
  extension.writeUInt32BE(UNKNOWN_EXTENSION, 0);
  extension.writeUInt32BE(21, 4);
  extension.write('keep me, byte by byte', 8);
  const moved = Buffer.concat([extension, name]);
  patchBytes(image, at, moved);
  if (name.length > 0) patchU64(image, header.BACKING_OFFSET, () => BigInt(at + extension.length));
}

/** Make the type of the backing format extension one that nobody knows: the image then names no backing format. */
function forgetBackingFormat(image: string): void {
  const first = readBytes(image, 0, 4096);
  patchBytes(image, first.indexOf(Buffer.from([0xe2, 0x79, 0x2a, 0xca])), Buffer.from('none'));
}

/** One entry of the snapshot table, cut into its parts (qcow2 specification, "Snapshots"). */
interface SnapshotEntry {
  readonly fixed: Buffer;
  extra: Buffer;
  readonly names: Buffer;
}

function readSnapshots(image: string): SnapshotEntry[] {
  const count = readBytes(image, header.SNAPSHOT_COUNT, 4).readUInt32BE();
  const table = readBytes(image, snapshotTableOffset(image), 64 * KiB);
  const entries: SnapshotEntry[] = [];
  for (let at = 0; entries.length < count; ) {
    const names = at + 40 + table.readUInt32BE(at + 36);
    const end = names + table.readUInt16BE(at + 12) + table.readUInt16BE(at + 14);
    entries.push({
      fixed: table.subarray(at, at + 40),
      extra: table.subarray(at + 40, names),
      names: table.subarray(names, end),
    });
    at = Math.ceil(end / 8) * 8;
  }
  return entries;
}

const snapshotTableOffset = (image: string): number =>
  Number(readBytes(image, header.SNAPSHOTS_OFFSET, 8).readBigUInt64BE());

/** Rewrite the snapshot table in place; it must still fit into its cluster. */
function changeSnapshots(image: string, change: (entry: SnapshotEntry, index: number) => void): void {
  const entries = readSnapshots(image);
  entries.forEach(change);
  const bytes = entries.map(({ fixed, extra, names }) => {
    fixed.writeUInt32BE(extra.length, 36);
    const entry = Buffer.concat([fixed, extra, names]);
    return Buffer.concat([entry, Buffer.alloc((8 - (entry.length % 8)) % 8)]);
  });
  patchBytes(image, snapshotTableOffset(image), Buffer.concat(bytes));
}

/** Several snapshots with writes between them. */
function withSnapshots(
  image: string,
  size: number,
  cluster: number,
  names: readonly string[],
  kinds = EVERY_KIND,
): string {
  names.forEach((name, index) => {
    snapshot(image, name);
    edit(image, 40 + index, mixture(size, cluster, 40 + index, kinds, 8));
  });
  return image;
}

/** Bytes of the VM state that `vmState` leaves. */
export const VM_STATE_BYTES = 100 * KiB;

/**
 * A snapshot with VM state, as savevm leaves it, without a virtual machine: the state lies behind the disk's end,
 * at the first L1 entry the disk does not need. So the disk is made larger, written there, and cut back.
 */
function vmState(dir: string): string {
  const size = 6 * MiB; // with clusters of 4 KiB an L1 entry covers 2 MiB: the state starts at 6 MiB
  const image = create(dir, 8 * MiB, { cluster_size: 4 * KiB });
  edit(image, 8, [...mixture(size, 4 * KiB, 8), `write -q -s $RANDOM ${size} ${VM_STATE_BYTES}`]);
  snapshot(image, 'running');
  changeSnapshots(image, ({ fixed, extra }) => {
    fixed.writeUInt32BE(VM_STATE_BYTES, 32); // the old 32-bit field
    extra.writeBigUInt64BE(BigInt(VM_STATE_BYTES), 0);
    extra.writeBigUInt64BE(BigInt(size), 8); // the disk's size in the snapshot
  });
  qemuImg(image, ['resize', '-q', '--shrink', image, String(size)]);
  edit(image, 9, mixture(size, 4 * KiB, 9, EVERY_KIND, 8));
  return image;
}

const ODD_NAMES = [
  'a b',
  'ünïcödé ✓',
  'twice',
  'twice',
  '2',
  'with/slash',
  '..',
  '',
  '-dash',
  '~',
  'twice~3',
  'line\nbreak',
  'x'.repeat(255),
];

function oddNames(dir: string): string {
  const size = 4 * MiB;
  const image = filled(dir, size);
  withSnapshots(image, size, 64 * KiB, ODD_NAMES);
  // Node passes no argument that is not UTF-8; a shell does.
  const script = 'qemu-img snapshot -c "$(printf "bad\\377utf8")" "$1"';
  const { status, stderr } = spawnSync('sh', ['-c', script, 'sh', image], { encoding: 'utf8' });
  if (status !== 0) throw new Error(`${script}: ${stderr}`);
  edit(image, 60, mixture(size, 64 * KiB, 60, EVERY_KIND, 4));
  return image;
}

type Defaults = 'checkpoints' | 'sparse' | 'resized' | 'headerBytes' | 'rawDataFile' | 'version';

function variant(given: Omit<Variant, Defaults> & Partial<Pick<Variant, Defaults>>): Variant {
  return {
    checkpoints: 6,
    sparse: false,
    resized: false,
    headerBytes: undefined,
    rawDataFile: undefined,
    version: 3,
    ...given,
  };
}

/** A size for a cluster size: enough clusters for every kind of neighbour, few enough bytes to compare quickly. */
function sizeFor(cluster: number): number {
  if (cluster < 4 * KiB) return 4 * MiB;
  if (cluster < 512 * KiB) return 12 * MiB;
  return 48 * MiB;
}

const inUnits = (bytes: number): string =>
  bytes >= MiB ? `${bytes / MiB}m` : bytes >= KiB ? `${bytes / KiB}k` : `${bytes}`;

const CLUSTERS = [512, KiB, 2 * KiB, 4 * KiB, 16 * KiB, 64 * KiB, 512 * KiB, MiB, 2 * MiB];
const ODD_SIZE = 1_000_003;

const clusterVariants = CLUSTERS.map((cluster) =>
  variant({
    name: `v3-${inUnits(cluster)}`,
    what: `version 3, clusters of ${cluster} bytes`,
    features: ['v3', `cluster ${cluster}`],
    make: (dir) => filled(dir, sizeFor(cluster), { cluster_size: cluster }),
  }),
);

const versionTwoVariants = [512, 4 * KiB, 64 * KiB, 2 * MiB].map((cluster) =>
  variant({
    name: `v2-${inUnits(cluster)}`,
    what: `version 2, clusters of ${cluster} bytes`,
    features: ['v2', `cluster ${cluster}`],
    version: 2,
    make: (dir) => filled(dir, sizeFor(cluster), { compat: '0.10', cluster_size: cluster }),
  }),
);

// 1 bit can only say free or used once. 2 bits count to 3: the disk and two checkpoints.
const refcountVariants = (
  [
    [1, 0],
    [2, 2],
    [4, 6],
    [8, 6],
    [16, 6],
    [32, 6],
    [64, 6],
  ] as const
).map(([bits, checkpoints]) =>
  variant({
    name: `refcount-${bits}`,
    what: `refcounts of ${bits} bits`,
    features: [`refcount bits ${bits}`, 'cluster 4096'],
    checkpoints,
    make: (dir) => filled(dir, 8 * MiB, { refcount_bits: bits, cluster_size: 4 * KiB }),
  }),
);

const zeroVariants = [
  variant({
    name: 'zero-preallocated',
    what: 'zero clusters that keep their host cluster, over a backing file that they hide',
    features: ['zero clusters', 'preallocated', 'backing'],
    make(dir) {
      const image = overlay(dir, 8 * MiB);
      edit(image, 3, [
        'write -q -s $RANDOM 1M 2M',
        'write -q -z 1M 1M',
        'write -q -z 2560k 70001',
        'write -q -z 5M 1M',
      ]);
      return image;
    },
  }),
  variant({
    name: 'zero-plain',
    what: 'zero clusters without a host cluster, over a backing file that they hide',
    features: ['zero clusters', 'backing'],
    make(dir) {
      const image = overlay(dir, 8 * MiB);
      edit(image, 3, [
        'write -q -s $RANDOM 1M 2M',
        'write -q -z -u 1M 1M',
        'write -q -z -u 5M 1M',
        'discard -q 2M 512k',
      ]);
      return image;
    },
  }),
  variant({
    name: 'zero-alone',
    what: 'zero clusters of both kinds without a backing file',
    features: ['zero clusters', 'preallocated', 'cluster 4096'],
    make(dir) {
      const image = create(dir, 4 * MiB, { cluster_size: 4 * KiB });
      edit(image, 3, [
        'write -q -s $RANDOM 0 3M',
        'write -q -z 100k 300k',
        'write -q -z -u 1M 1M',
        'write -q -s $RANDOM 1500k 7777',
      ]);
      return image;
    },
  }),
  variant({
    name: 'zero-v2',
    what: 'version 2, which has no zero clusters, written with zeros and discarded over a backing file',
    features: ['v2', 'backing'],
    version: 2,
    make: (dir) => overlay(dir, 8 * MiB, { compat: '0.10' }),
  }),
];

const compressedVariants = [
  variant({
    name: 'deflate',
    what: 'converted with compression, deflate',
    features: ['compressed', 'deflate'],
    make: (dir) => compressed(dir, 12 * MiB, {}),
  }),
  variant({
    name: 'zstd',
    what: 'converted with compression, zstd',
    features: ['compressed', 'zstd', 'incompatible bit 3'],
    make: (dir) => compressed(dir, 12 * MiB, { compression_type: 'zstd' }),
  }),
  variant({
    name: 'deflate-512',
    what: 'compressed clusters of 512 bytes',
    features: ['compressed', 'deflate', 'cluster 512'],
    make: (dir) => compressed(dir, 2 * MiB, { cluster_size: 512 }),
  }),
  variant({
    name: 'zstd-4k',
    what: 'compressed clusters of 4 KiB, zstd',
    features: ['compressed', 'zstd', 'cluster 4096'],
    make: (dir) => compressed(dir, 8 * MiB, { cluster_size: 4 * KiB, compression_type: 'zstd' }),
  }),
  variant({
    name: 'deflate-2m',
    what: 'compressed clusters of 2 MiB, each over many sectors',
    features: ['compressed', 'deflate', 'cluster 2097152'],
    make: (dir) => compressed(dir, 32 * MiB, { cluster_size: 2 * MiB }),
  }),
  variant({
    name: 'zstd-2m',
    what: 'compressed clusters of 2 MiB, zstd',
    features: ['compressed', 'zstd', 'cluster 2097152'],
    make: (dir) => compressed(dir, 32 * MiB, { cluster_size: 2 * MiB, compression_type: 'zstd' }),
  }),
  variant({
    name: 'deflate-v2',
    what: 'version 2 with compressed clusters',
    features: ['v2', 'compressed', 'deflate'],
    version: 2,
    make: (dir) => compressed(dir, 8 * MiB, { compat: '0.10' }),
  }),
  variant({
    name: 'deflate-overwritten',
    what: 'compressed clusters, partly overwritten, with others compressed in between by qemu-io',
    features: ['compressed', 'deflate'],
    make(dir) {
      const image = compressed(dir, 8 * MiB, {});
      edit(image, 4, mixture(8 * MiB, 16 * KiB, 4, EVERY_KIND, 12));
      return image;
    },
  }),
  variant({
    name: 'zstd-overwritten',
    what: 'zstd clusters, partly overwritten',
    features: ['compressed', 'zstd'],
    make(dir) {
      const image = compressed(dir, 8 * MiB, { compression_type: 'zstd' });
      edit(image, 4, mixture(8 * MiB, 16 * KiB, 4, EVERY_KIND, 12));
      return image;
    },
  }),
  variant({
    name: 'deflate-by-qemu-io',
    what: 'single compressed clusters between plain ones, over a backing file, the last one cut off by the end of the disk',
    features: ['compressed', 'deflate', 'backing'],
    make(dir) {
      const size = 4 * MiB + 5 * 512;
      rawFile(dir, 'base.raw', size, 7);
      const image = create(dir, size, { backing_file: 'base.raw', backing_fmt: 'raw' });
      const starts = [0, 3, 4, 5, 17, 40, 63].map((index) => index * 64 * KiB);
      edit(image, 6, [
        ...starts.map((start) => `write -q -c -s $TEXT ${start} 64k`),
        `write -q -c -P 7 ${4 * MiB} ${5 * 512}`,
        ...mixture(2 * MiB, 64 * KiB, 6, EVERY_KIND, 8),
      ]);
      return image;
    },
  }),
  variant({
    name: 'deflate-snapshots',
    what: 'snapshots that share compressed clusters with the disk',
    features: ['compressed', 'deflate', 'snapshots'],
    make: (dir) => withSnapshots(compressed(dir, 6 * MiB, {}), 6 * MiB, 64 * KiB, ['first', 'second', 'third']),
  }),
];

const subclusterVariants = [16 * KiB, 64 * KiB, 2 * MiB]
  .map((cluster) =>
    variant({
      name: `extended-l2-${inUnits(cluster)}`,
      what: `extended L2 entries with clusters of ${cluster} bytes, subclusters partly allocated, partly zero`,
      features: ['extended L2', 'incompatible bit 4', `cluster ${cluster}`],
      make(dir) {
        const size = sizeFor(cluster);
        const image = create(dir, size, { extended_l2: 'on', cluster_size: cluster });
        edit(image, 2, mixture(size, cluster / 8, 2, EVERY_KIND, 60));
        return image;
      },
    }),
  )
  .concat([
    variant({
      name: 'extended-l2-backing',
      what: 'extended L2 entries over a backing file: each subcluster from another layer',
      features: ['extended L2', 'backing'],
      make(dir) {
        const image = overlay(dir, 8 * MiB, { extended_l2: 'on', cluster_size: 64 * KiB });
        edit(image, 2, mixture(8 * MiB, 4 * KiB, 2, EVERY_KIND, 60));
        return image;
      },
    }),
    variant({
      name: 'extended-l2-compressed',
      what: 'extended L2 entries with compressed clusters between, and snapshots',
      features: ['extended L2', 'compressed', 'zstd', 'snapshots'],
      make(dir) {
        const image = compressed(dir, 8 * MiB, { extended_l2: 'on', cluster_size: 64 * KiB, compression_type: 'zstd' });
        return withSnapshots(image, 8 * MiB, 8 * KiB, ['one', 'two']);
      },
    }),
  ]);

const dataFileVariants = [
  variant({
    name: 'data-file',
    what: 'external data file with a relative name',
    features: ['external data file', 'incompatible bit 2'],
    checkpoints: 0,
    make: (dir) => filled(dir, 8 * MiB, { data_file: 'disk.data' }),
  }),
  variant({
    name: 'data-file-4k',
    what: 'external data file with clusters of 4 KiB over a backing file',
    features: ['external data file', 'backing', 'cluster 4096'],
    checkpoints: 0,
    make: (dir) => overlay(dir, 8 * MiB, { data_file: join(dir, 'disk.data'), cluster_size: 4 * KiB }),
  }),
  variant({
    name: 'data-file-raw',
    what: 'external data file, absolute name, that is the disk itself as raw',
    features: ['external data file', 'raw external data'],
    checkpoints: 0,
    rawDataFile: 'disk.data',
    make: (dir) => filled(dir, 8 * MiB, { data_file: join(dir, 'disk.data'), data_file_raw: 'on' }),
  }),
  variant({
    name: 'data-file-extended-l2',
    what: 'external data file with extended L2 entries',
    features: ['external data file', 'extended L2'],
    checkpoints: 0,
    make: (dir) => filled(dir, 8 * MiB, { data_file: join(dir, 'disk.data'), extended_l2: 'on' }),
  }),
];

const headerVariants = [
  variant({
    name: 'lazy',
    what: 'lazy refcounts, cleanly closed',
    features: ['lazy refcounts'],
    make: (dir) => filled(dir, 8 * MiB, { lazy_refcounts: 'on' }),
  }),
  variant({
    name: 'dirty',
    what: 'lazy refcounts, and its writer was killed: the dirty bit is set and refcounts are wrong',
    features: ['lazy refcounts', 'dirty'],
    make(dir) {
      const image = filled(dir, 8 * MiB, { lazy_refcounts: 'on' });
      edit(image, 30, [...mixture(8 * MiB, 64 * KiB, 30), 'flush'], qemuIoKilled);
      return image;
    },
  }),
  variant({
    name: 'dirty-snapshots',
    what: 'killed while it has snapshots and clusters of 4 KiB',
    features: ['lazy refcounts', 'dirty', 'snapshots'],
    make(dir) {
      const image = filled(dir, 8 * MiB, { lazy_refcounts: 'on', cluster_size: 4 * KiB });
      withSnapshots(image, 8 * MiB, 4 * KiB, ['before', 'between']);
      edit(image, 31, [...mixture(8 * MiB, 16 * KiB, 31), 'flush'], qemuIoKilled);
      return image;
    },
  }),
  variant({
    name: 'bitmaps',
    what: 'two persistent bitmaps, one disabled',
    features: ['bitmaps', 'autoclear bit 0'],
    make(dir) {
      const image = filled(dir, 16 * MiB);
      qemuImg(image, ['bitmap', '--add', '-g', '64k', image, 'recording']);
      qemuImg(image, ['bitmap', '--add', '--disable', '-g', '4k', image, 'idle']);
      edit(image, 32, mixture(16 * MiB, 64 * KiB, 32));
      return image;
    },
  }),
  variant({
    name: 'unknown-extension',
    what: 'a header extension that nobody knows',
    features: ['header extension'],
    make(dir) {
      const image = filled(dir, 4 * MiB);
      addUnknownExtension(image);
      return image;
    },
  }),
  variant({
    name: 'unknown-extension-backing',
    what: 'a header extension that nobody knows before the name of the backing file',
    features: ['header extension', 'backing'],
    make(dir) {
      const image = overlay(dir, 4 * MiB);
      addUnknownExtension(image);
      return image;
    },
  }),
  variant({
    name: 'unknown-autoclear',
    what: 'an autoclear bit that nobody knows: to be cleared by the first write',
    features: ['autoclear bit 17'],
    make(dir) {
      const image = filled(dir, 4 * MiB);
      patchU64(image, header.AUTOCLEAR, (bits) => bits | (1n << 17n));
      return image;
    },
  }),
  variant({
    name: 'unknown-compatible',
    what: 'a compatible bit that nobody knows: of no matter',
    features: ['compatible bit 33'],
    make(dir) {
      const image = filled(dir, 4 * MiB);
      patchU64(image, header.COMPATIBLE, (bits) => bits | (1n << 33n));
      return image;
    },
  }),
];

const backingVariants = [
  variant({
    name: 'backing-1',
    what: 'qcow2 over raw',
    features: ['backing'],
    make: (dir) => chain(dir, 1, 8 * MiB, () => 64 * KiB),
  }),
  variant({
    name: 'backing-3',
    what: 'three qcow2 over raw, with other cluster sizes at each level',
    features: ['backing', 'mixed cluster sizes'],
    make: (dir) => chain(dir, 3, 8 * MiB, (level) => [4 * KiB, MiB, 64 * KiB][level - 1] ?? 64 * KiB),
  }),
  variant({
    name: 'backing-20',
    what: 'twenty qcow2 over raw, cluster sizes from 512 bytes to 2 MiB',
    features: ['backing', 'mixed cluster sizes'],
    make: (dir) => chain(dir, 20, 4 * MiB, (level) => CLUSTERS[level % CLUSTERS.length] ?? 64 * KiB),
  }),
  variant({
    name: 'backing-absolute',
    what: 'an absolute name of the backing file',
    features: ['backing'],
    make(dir) {
      rawFile(dir, 'base.raw', 4 * MiB, 7);
      return filled(dir, 4 * MiB, { backing_file: join(dir, 'base.raw'), backing_fmt: 'raw' });
    },
  }),
  variant({
    name: 'backing-file-prefix',
    what: 'a name of the backing file with file: in front',
    features: ['backing'],
    make(dir) {
      rawFile(dir, 'base.raw', 4 * MiB, 7);
      return filled(dir, 4 * MiB, { backing_file: `file:${join(dir, 'base.raw')}`, backing_fmt: 'raw' });
    },
  }),
  variant({
    name: 'backing-no-format',
    what: 'the format of the backing file is not said: it is found out',
    features: ['backing'],
    make(dir) {
      filled(dir, 4 * MiB, { cluster_size: 4 * KiB }, 'base.qcow2', 9);
      const image = filled(dir, 4 * MiB, { backing_file: 'base.qcow2', backing_fmt: 'qcow2' });
      forgetBackingFormat(image);
      return image;
    },
  }),
  variant({
    name: 'backing-shorter',
    what: 'the backing file ends inside a cluster of the overlay: zeros follow',
    features: ['backing'],
    make: (dir) => overlay(dir, 8 * MiB, {}, 5 * MiB + 3 * 512),
  }),
  variant({
    name: 'backing-longer',
    what: 'the backing file goes on where the overlay ends',
    features: ['backing'],
    make: (dir) => overlay(dir, 5 * MiB + 3 * 512, {}, 8 * MiB),
  }),
  variant({
    name: 'backing-odd',
    what: 'the raw backing file is no multiple of a sector',
    features: ['backing'],
    make: (dir) => overlay(dir, 2 * MiB, { cluster_size: 16 * KiB }, ODD_SIZE),
  }),
  variant({
    name: 'backing-v2',
    what: 'version 3 over version 2 with compressed clusters over raw that is too short',
    features: ['v2', 'v3', 'backing', 'compressed'],
    make(dir) {
      rawFile(dir, 'base.raw', 3 * MiB + 100, 7);
      const options = { compat: '0.10', backing_file: 'base.raw', backing_fmt: 'raw' };
      const middle = create(dir, 4 * MiB, options, 'middle.qcow2');
      const packed = ['write -q -c -s $TEXT 1M 64k', 'write -q -c -s $TEXT 2M 64k'];
      edit(middle, 33, [...packed, ...mixture(4 * MiB, 64 * KiB, 33, EVERY_KIND, 8)]);
      return filled(dir, 6 * MiB, { backing_file: 'middle.qcow2', backing_fmt: 'qcow2', cluster_size: 4 * KiB });
    },
  }),
  variant({
    name: 'backing-snapshots',
    what: 'snapshots in the overlay and others in its backing file',
    features: ['backing', 'snapshots'],
    make(dir) {
      const base = filled(dir, 6 * MiB, {}, 'base.qcow2', 9);
      withSnapshots(base, 6 * MiB, 64 * KiB, ['of the base']);
      const image = filled(dir, 6 * MiB, { backing_file: 'base.qcow2', backing_fmt: 'qcow2' });
      return withSnapshots(image, 6 * MiB, 64 * KiB, ['one', 'two']);
    },
  }),
];

const sizeVariants = [
  variant({
    name: 'size-odd-clusters',
    what: 'the disk ends inside a cluster',
    features: ['odd size'],
    make: (dir) => filled(dir, 5 * MiB + 7 * 512),
  }),
  variant({
    name: 'size-odd-bytes',
    what: 'the size in the header is no multiple of a sector',
    features: ['odd size'],
    headerBytes: ODD_SIZE,
    make(dir) {
      const image = filled(dir, Math.ceil(ODD_SIZE / 512) * 512, { cluster_size: 4 * KiB });
      patchU64(image, header.SIZE, () => BigInt(ODD_SIZE));
      return image;
    },
  }),
  variant({
    name: 'size-0',
    what: 'a disk without a byte',
    features: ['odd size'],
    make: (dir) => create(dir, 0),
  }),
  variant({
    name: 'size-512',
    what: 'a disk of one sector',
    features: ['odd size'],
    make(dir) {
      const image = create(dir, 512);
      edit(image, 39, ['write -q -s $RANDOM 0 512', 'write -q -P 5 100 7']);
      return image;
    },
  }),
  variant({
    name: 'l1-grown',
    what: 'clusters of 512 bytes, enlarged so that the L1 table had to move',
    features: ['L1 growth', 'cluster 512'],
    make(dir) {
      const image = filled(dir, MiB, { cluster_size: 512 });
      qemuImg(image, ['resize', '-q', image, String(12 * MiB)]);
      edit(image, 34, mixture(12 * MiB, 16 * KiB, 34));
      return image;
    },
  }),
  variant({
    name: 'refcount-table-grown',
    what: 'clusters of 512 bytes and refcounts of 64 bits: a refcount block covers 32 KiB, and the table had to move',
    features: ['refcount table growth', 'cluster 512', 'refcount bits 64'],
    make(dir) {
      const image = create(dir, 8 * MiB, { cluster_size: 512, refcount_bits: 64 });
      edit(image, 35, [
        'write -q -s $RANDOM 0 6M',
        'discard -q 1M 1M',
        ...mixture(8 * MiB, 4 * KiB, 35, EVERY_KIND, 8),
      ]);
      return image;
    },
  }),
  variant({
    name: 'huge-2m',
    what: '64 TiB with clusters of 2 MiB, data at both ends and in the middle',
    features: ['64 TiB', 'cluster 2097152'],
    sparse: true,
    make: (dir) => huge(dir, 2 * MiB),
  }),
  variant({
    name: 'huge-64k',
    what: '64 TiB with clusters of 64 KiB: an L1 table of 1 MiB',
    features: ['64 TiB', 'cluster 65536'],
    sparse: true,
    make: (dir) => huge(dir, 64 * KiB),
  }),
  variant({
    name: 'preallocation-metadata',
    what: 'preallocated metadata: every cluster mapped, none written',
    features: ['preallocation metadata'],
    make: (dir) => filled(dir, 16 * MiB, { preallocation: 'metadata' }),
  }),
  variant({
    name: 'preallocation-falloc',
    what: 'preallocated by fallocate',
    features: ['preallocation falloc'],
    make: (dir) => filled(dir, 16 * MiB, { preallocation: 'falloc', cluster_size: 4 * KiB }),
  }),
  variant({
    name: 'preallocation-full',
    what: 'preallocated by writing',
    features: ['preallocation full'],
    make: (dir) => filled(dir, 8 * MiB, { preallocation: 'full' }),
  }),
];

function huge(dir: string, cluster: number): string {
  const size = 64 * TiB;
  const image = create(dir, size, { cluster_size: cluster });
  edit(image, 36, [
    'write -q -s $RANDOM 0 100k',
    `write -q -s $RANDOM ${40 * TiB + 12_345} 300k`,
    `write -q -P 9 ${size - GiB} 64k`,
    `write -q -z ${20 * TiB} 4M`,
    `write -q -s $RANDOM ${size - 70_000} 70000`,
  ]);
  snapshot(image, 'early');
  edit(image, 37, ['write -q -s $RANDOM 50k 4k', `write -q -s $RANDOM ${17 * TiB} 64k`]);
  return image;
}

const snapshotVariants = [
  variant({
    name: 'snapshots',
    what: 'four snapshots with writes between them',
    features: ['snapshots'],
    make: (dir) => withSnapshots(filled(dir, 8 * MiB), 8 * MiB, 64 * KiB, ['one', 'two', 'three', 'four']),
  }),
  variant({
    name: 'snapshots-v2',
    what: 'version 2 with snapshots whose entries have no extra data, as old QEMU wrote them',
    features: ['v2', 'snapshots', 'cluster 4096'],
    version: 2,
    make(dir) {
      const image = filled(dir, 6 * MiB, { compat: '0.10', cluster_size: 4 * KiB });
      withSnapshots(image, 6 * MiB, 4 * KiB, ['one', 'two', 'three']);
      changeSnapshots(image, (entry, index) => {
        if (index > 0) entry.extra = Buffer.alloc(0);
      });
      return image;
    },
  }),
  variant({
    name: 'snapshots-512',
    what: 'snapshots with clusters of 512 bytes: their table is longer than a cluster',
    features: ['snapshots', 'cluster 512'],
    make(dir) {
      const image = filled(dir, 2 * MiB, { cluster_size: 512 });
      return withSnapshots(image, 2 * MiB, 4 * KiB, [
        'a'.repeat(200),
        'b'.repeat(200),
        'c'.repeat(200),
        'd'.repeat(200),
      ]);
    },
  }),
  variant({
    name: 'snapshots-extra-data',
    what: 'snapshot entries with more extra data than anybody knows',
    features: ['snapshots', 'snapshot extra data'],
    make(dir) {
      const image = withSnapshots(filled(dir, 6 * MiB), 6 * MiB, 64 * KiB, ['one', 'two']);
      changeSnapshots(image, (entry, index) => {
        entry.extra = Buffer.concat([entry.extra, new Random(50 + index).bytes(16 + 8 * index)]);
      });
      return image;
    },
  }),
  variant({
    name: 'snapshots-resized',
    what: 'snapshots of a smaller and of a larger disk',
    features: ['snapshots', 'resized'],
    resized: true,
    make(dir) {
      const image = filled(dir, 6 * MiB, { cluster_size: 4 * KiB });
      withSnapshots(image, 6 * MiB, 4 * KiB, ['six']);
      qemuImg(image, ['resize', '-q', image, String(9 * MiB)]);
      withSnapshots(image, 9 * MiB, 4 * KiB, ['nine']);
      qemuImg(image, ['resize', '-q', '--shrink', image, String(4 * MiB + 512)]);
      return withSnapshots(image, 4 * MiB + 512, 4 * KiB, ['four']);
    },
  }),
  variant({
    name: 'snapshots-backing-resized',
    what: 'a snapshot of a shorter disk over a backing file that goes on',
    features: ['snapshots', 'resized', 'backing'],
    resized: true,
    make(dir) {
      const image = overlay(dir, 4 * MiB, {}, 8 * MiB);
      snapshot(image, 'short');
      qemuImg(image, ['resize', '-q', image, String(7 * MiB)]);
      edit(image, 38, mixture(7 * MiB, 64 * KiB, 38, EVERY_KIND, 8));
      return image;
    },
  }),
  variant({
    name: 'snapshots-odd-names',
    what: 'snapshots whose names are no file names, stand twice, or look like an ID',
    features: ['snapshots', 'odd names'],
    make: oddNames,
  }),
  variant({
    name: 'snapshots-extended-l2',
    what: 'snapshots with extended L2 entries, over a backing file',
    features: ['snapshots', 'extended L2', 'backing'],
    make(dir) {
      const image = overlay(dir, 6 * MiB, { extended_l2: 'on', cluster_size: 16 * KiB });
      return withSnapshots(image, 6 * MiB, 2 * KiB, ['one', 'two', 'three']);
    },
  }),
  variant({
    name: 'snapshots-bitmaps',
    what: 'snapshots, persistent bitmaps and lazy refcounts together',
    features: ['snapshots', 'bitmaps', 'lazy refcounts'],
    make(dir) {
      const image = filled(dir, 6 * MiB, { lazy_refcounts: 'on' });
      qemuImg(image, ['bitmap', '--add', image, 'recording']);
      return withSnapshots(image, 6 * MiB, 64 * KiB, ['one', 'two']);
    },
  }),
  variant({
    name: 'vm-state',
    what: 'a snapshot with VM state behind the end of the disk',
    features: ['snapshots', 'vm state', 'cluster 4096'],
    make: vmState,
  }),
];

export const corpus: readonly Variant[] = [
  ...clusterVariants,
  ...versionTwoVariants,
  ...refcountVariants,
  ...zeroVariants,
  ...compressedVariants,
  ...subclusterVariants,
  ...dataFileVariants,
  ...headerVariants,
  ...backingVariants,
  ...sizeVariants,
  ...snapshotVariants,
];

/**
 * Run `read` on the image, or, where QEMU would leave out the last part of a sector, on a copy that ends with a whole
 * one; the model it returns is then cut to the size in the header.
 */
function withWholeSectors(of: Variant, image: string, read: (image: string) => SparseModel): SparseModel {
  if (of.headerBytes === undefined) return read(image);
  const copy = join(dirname(image), `rounded-${basename(image)}`);
  try {
    copySparse(image, copy);
    let bytes = 0;
    patchU64(copy, header.SIZE, (size) => {
      bytes = Number(size);
      return (size + 511n) & ~511n;
    });
    const model = read(copy);
    model.resize(bytes);
    return model;
  } finally {
    rmSync(copy, { force: true });
  }
}

/** The disk as QEMU reads it. */
export const referenceDisk = (of: Variant, image: string): SparseModel =>
  withWholeSectors(of, image, of.sparse ? mappedDisk : convertedDisk);

/** A snapshot as QEMU reads it. `ownSize`: it may have another size than the disk. */
export function referenceSnapshot(of: Variant, image: string, id: string, ownSize = of.resized): SparseModel {
  if (of.sparse || ownSize) return appliedSnapshot(image, id, (copy) => referenceDisk(of, copy));
  return withWholeSectors(of, image, (path) => convertedSnapshot(path, id));
}

/** Autoclear feature bits of the header. */
export const autoclearBits = (image: string): bigint => readBytes(image, header.AUTOCLEAR, 8).readBigUInt64BE();

/** The bytes of header and extensions. */
export const headerCluster = (image: string): Buffer => readBytes(image, 0, 4096);

/** Extra data of each snapshot, by ID. */
export function snapshotExtraData(image: string): Map<string, Buffer> {
  const result = new Map<string, Buffer>();
  for (const { fixed, extra, names } of readSnapshots(image)) {
    result.set(names.subarray(0, fixed.readUInt16BE(12)).toString(), extra);
  }
  return result;
}

/** Images enough to show that the other driver carries the same bytes; the engine behind it is the same. */
const SMALL_CORPUS = [
  ...['v3-64k', 'v2-4k', 'zstd', 'extended-l2-backing', 'data-file-raw', 'dirty', 'backing-3'],
  ...['size-odd-bytes', 'huge-64k', 'snapshots', 'snapshots-resized', 'snapshots-odd-names'],
];

/** The images that are tested with that driver. */
export const corpusOf = (driver: 'native' | 'fuse-native'): readonly Variant[] =>
  driver === 'native' ? corpus : corpus.filter(({ name }) => SMALL_CORPUS.includes(name));
