/** The servers against each other, by fio, in turns. */
import { spawnSync } from 'node:child_process';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { fio, inWords, type Job } from './jobs.ts';
import { run } from './processes.ts';
import type { Images, RawFile, Server } from './servers.ts';
import { median, table } from './statistics.ts';

const MiB = 1 << 20;
const GiB = 1024 * MiB;
export const DISK_BYTES = 4 * GiB;
export const WRITTEN_BYTES = 2 * GiB;

export interface Rounds {
  readonly rounds: number;
  readonly seconds: number;
  readonly say: (line: string) => void;
}

type BothImages = Images & { readonly raw: RawFile };

/** A qcow2 and a raw file of 4 GiB with the first 2 GiB written. */
export async function makeImages(directory: string): Promise<BothImages> {
  const qcow2 = join(directory, 'bench.qcow2');
  await makeWritten('qcow2', qcow2, 0);
  // The raw file has the disk where the qcow2 file has its first data cluster.
  const map = await run('qemu-img', ['map', '--output=json', '-f', 'qcow2', qcow2]);
  const start = (JSON.parse(map) as { offset: number }[])[0]?.offset ?? 0;
  const raw = { path: join(directory, 'bench.raw'), start };
  await makeWritten('raw', raw.path, start);
  return { qcow2, raw, size: DISK_BYTES };
}

async function makeWritten(format: 'qcow2' | 'raw', file: string, start: number): Promise<void> {
  const step = 256 * MiB;
  const writes = Array.from({ length: WRITTEN_BYTES / step }, (_, index) => [
    '-c',
    `write -q -P ${index + 1} ${start + index * step} ${step}`,
  ]);
  await run('qemu-img', ['create', '-q', '-f', format, file, String(start + DISK_BYTES)]);
  await run('qemu-io', ['-f', format, ...writes.flat(), file]);
}

async function freshImages(directory: string): Promise<BothImages> {
  const qcow2 = join(directory, 'fresh.qcow2');
  const raw = { path: join(directory, 'fresh.raw'), start: 0 };
  await run('qemu-img', ['create', '-q', '-f', 'qcow2', qcow2, String(DISK_BYTES)]);
  await run('qemu-img', ['create', '-q', '-f', 'raw', raw.path, String(DISK_BYTES)]);
  return { qcow2, raw, size: DISK_BYTES };
}

/** What was measured of one job: server name → one value a round. */
type Samples = Map<string, number[]>;

/** Most memory that each server ever used, in bytes, and its mount times in milliseconds. */
export interface Footprint {
  readonly memory: Map<string, number>;
  readonly mountMs: Map<string, number[]>;
}

export interface Throughput {
  readonly job: Job;
  readonly samples: Samples;
}

/** One job on all servers, round after round; who begins changes with the round. */
export async function measure(
  job: Job,
  servers: readonly Server[],
  given: { images: BothImages; directory: string; core: number | undefined; footprint: Footprint },
  { rounds, seconds, say }: Rounds,
): Promise<Throughput> {
  const samples: Samples = new Map(servers.map(({ name }) => [name, []]));
  for (let round = 0; round < rounds; round++) {
    for (let turn = 0; turn < servers.length; turn++) {
      const server = servers[(round + turn) % servers.length] as Server;
      const images = job.allocates ? await freshImages(given.directory) : given.images;
      try {
        await server.serve(images, async (served) => {
          const span = job.allocates ? DISK_BYTES : WRITTEN_BYTES;
          samples.get(server.name)?.push(await fio(job, served.file, { seconds, span, core: given.core }));
          const { memory, mountMs } = given.footprint;
          memory.set(server.name, Math.max(memory.get(server.name) ?? 0, served.peakMemory()));
          mountMs.set(server.name, [...(mountMs.get(server.name) ?? []), served.mountMs]);
        });
      } finally {
        if (job.allocates) await Promise.all([rm(images.qcow2), rm(images.raw.path)]);
      }
      // The next one must not pay for this one's dirty pages.
      spawnSync('sync', ['-f', given.directory]);
    }
    say(`${job.what}${given.core === undefined ? '' : ', pinned'}: round ${round + 1} of ${rounds}`);
  }
  return { job, samples };
}

const middle = (row: Throughput, server: string): number => median(row.samples.get(server) ?? []);

/** How far the rounds of one server lie apart, at most: (highest - lowest) / median. */
function spread({ samples }: Throughput): string {
  const spreads = [...samples.values()].map((values) => (Math.max(...values) - Math.min(...values)) / median(values));
  return `${Math.round(100 * Math.max(...spreads))}%`;
}

/** Absolute numbers, ratios, and the goals beside them. */
export function report(rows: readonly Throughput[], servers: readonly Server[]): string {
  const others = servers.filter(({ name }) => name !== 'vdskfs');
  const heading = [
    'medians',
    ...servers.map(({ name }) => name),
    ...others.map(({ name }) => `vdskfs / ${name}`),
    'spread',
  ];
  const lines = rows.map((row) => [
    row.job.what,
    ...servers.map(({ name }) => inWords(row.job, middle(row, name))),
    ...others.map(({ name }) => {
      const goal = row.job.goals[name as keyof typeof row.job.goals];
      const ratio = `${(middle(row, 'vdskfs') / middle(row, name)).toFixed(2)}x`;
      return goal === undefined ? ratio : `${ratio} (goal ${goal.toFixed(1)})`;
    }),
    spread(row),
  ]);
  return table([heading, ...lines]);
}

/** What changes when the client is kept on one core. */
export function reportPinned(
  free: readonly Throughput[],
  pinned: readonly Throughput[],
  servers: readonly Server[],
): string {
  const lines = pinned.map((row) => {
    const before = free.find(({ job }) => job === row.job);
    return [
      row.job.what,
      ...servers.map(({ name }) => {
        const change = before ? `${(middle(row, name) / middle(before, name)).toFixed(2)}x` : '?';
        return `${inWords(row.job, middle(row, name))} (${change})`;
      }),
    ];
  });
  return table([['client on one core (to unpinned)', ...servers.map(({ name }) => name)], ...lines]);
}
