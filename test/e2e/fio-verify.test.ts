/** fio writes with checksums through a mount, at every queue depth and from several processes, and finds them again. */
import { mkdir, rmdir } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { withMount } from './mount.ts';
import { runOk, withDirectory } from './run.ts';

const KiB = 1024;
const MiB = 1024 * KiB;
const DISK_BYTES = 128 * MiB;

interface Image {
  readonly what: string;
  readonly options: string;
  /** Put a raw file with data below it. */
  readonly backed?: boolean;
}

const images: readonly Image[] = [
  { what: 'clusters of 64 KiB', options: 'cluster_size=64k' },
  { what: 'clusters of 4 KiB over a backing file', options: 'cluster_size=4k', backed: true },
  { what: 'extended L2 entries over a backing file', options: 'extended_l2=on', backed: true },
  { what: 'version 2, clusters of 512 bytes', options: 'compat=0.10,cluster_size=512' },
];

/** Write once to each block of a random order, in mixed sizes, and read all of them back. */
const randomWrites = (depth: number): string[] => [
  '--rw=randwrite',
  '--bssplit=4k/50:512/5:12k/15:64k/20:256k/10',
  '--ioengine=libaio',
  `--iodepth=${depth}`,
  '--size=48m',
  '--offset=1536', // no cluster begins there
];

/** `jobs`: one list of words for each job; what stands before the first name counts for all. */
async function fio(
  file: string,
  common: readonly string[],
  jobs: readonly (readonly string[])[] = [[]],
): Promise<void> {
  const words = [
    `--filename=${file}`,
    '--direct=1',
    '--verify=crc32c',
    '--verify_fatal=1',
    '--verify_state_save=0',
    '--randrepeat=1',
    ...common,
    ...jobs.flatMap((job, index) => [`--name=writer${index}`, ...job]),
  ];
  await runOk('fio', words);
}

async function create(directory: string, { options, backed }: Image): Promise<string> {
  const image = join(directory, 'disk.qcow2');
  const backing: string[] = [];
  if (backed) {
    const base = join(directory, 'base.raw');
    await runOk('qemu-img', ['create', '-q', '-f', 'raw', base, String(DISK_BYTES)]);
    await runOk('qemu-io', ['-f', 'raw', '-c', `write -q -P 77 0 ${DISK_BYTES / 2}`, base]);
    backing.push('-b', base, '-F', 'raw');
  }
  await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', options, ...backing, image, String(DISK_BYTES)]);
  return image;
}

/** After the unmount: no error, no leak, and every checksum in what QEMU reads and in what a second mount shows. */
async function expectKept(
  image: string,
  common: readonly string[],
  jobs?: readonly (readonly string[])[],
): Promise<void> {
  await runOk('qemu-img', ['check', '-q', image]);
  const raw = `${image}.raw`;
  await runOk('qemu-img', ['convert', '-O', 'raw', image, raw]);
  await fio(raw, [...common, '--verify_only'], jobs);
  await withMount(image, {}, (tree) => fio(tree.path('disk', 'disk.raw'), [...common, '--verify_only'], jobs));
  await runOk('qemu-img', ['check', '-q', image]);
}

describe.each(images)('on $what', (image) => {
  it.each([1, 8, 32])('fio finds every block that it wrote, %i in flight at once', (depth) =>
    withDirectory(async (directory) => {
      const path = await create(directory, image);
      await withMount(path, {}, (tree) => fio(tree.path('disk', 'disk.raw'), randomWrites(depth)));
      await expectKept(path, randomWrites(depth));
    }),
  );

  it('writers in several processes, each in a range of its own that begins inside a cluster of its neighbour', () =>
    withDirectory(async (directory) => {
      const path = await create(directory, image);
      const common = [
        '--rw=randwrite',
        '--bssplit=4k/60:512/10:64k/30',
        '--ioengine=libaio',
        '--iodepth=8',
        '--size=12m',
      ];
      const jobs = [0, 1, 2, 3].map((index) => [`--offset=${index * (12 * MiB + 512) + 1024}`]);
      await withMount(path, {}, (tree) => fio(tree.path('disk', 'disk.raw'), common, jobs));
      await expectKept(path, common, jobs);
    }));

  it('writers in several processes that take turns inside every cluster, flushing as they go', () =>
    withDirectory(async (directory) => {
      const path = await create(directory, image);
      // Each owns every fourth 4 KiB: all of them allocate the same clusters at the same moments.
      const common = ['--rw=write', '--bs=4k', '--ioengine=psync', '--fsync=64', '--size=16m', '--io_size=4m'];
      const strided = ['--zonemode=strided', '--zonesize=4k', '--zonerange=16k'];
      const jobs = [0, 1, 2, 3].map((index) => [`--offset=${index * 4 * KiB}`, ...strided]);
      await withMount(path, {}, (tree) => fio(tree.path('disk', 'disk.raw'), common, jobs));
      await expectKept(path, common, jobs);
    }));
});

it('checkpoints that come and go while writes are in flight harm none of them', () =>
  withDirectory(async (directory) => {
    const path = await create(directory, { what: '', options: 'cluster_size=64k' });
    const kept: string[] = [];
    await withMount(path, {}, async (tree) => {
      let writing = true;
      const written = fio(tree.path('disk', 'disk.raw'), randomWrites(32)).finally(() => {
        writing = false;
      });
      const comeAndGo = async (): Promise<void> => {
        for (let index = 0; writing; index++) {
          const checkpoint = tree.path('disk', 'snapshots', `${index}`);
          await mkdir(checkpoint);
          if (index % 8 === 0) kept.push(`${index}`);
          else await rmdir(checkpoint);
        }
      };
      await Promise.all([written, comeAndGo()]);
    });
    expect(kept).not.toEqual([]);
    await expectKept(path, randomWrites(32));
    const info = JSON.parse(await runOk('qemu-img', ['info', '--output=json', path])) as {
      snapshots: { name: string }[];
    };
    expect(info.snapshots.map(({ name }) => name)).toEqual(kept);
  }));
