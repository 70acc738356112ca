/** The rows of the comparison: what fio does, and what is hoped for. */
import { run } from './processes.ts';

/** Ratios of vdskfs to the others that the project set itself; shown, never judged. */
export interface Goals {
  readonly qemu: number;
  readonly 'qemu io_uring': number;
  readonly floor: number | undefined;
}

export interface Job {
  readonly name: string;
  readonly what: string;
  readonly rw: 'randread' | 'read' | 'randwrite' | 'write';
  /** Bytes of one request. */
  readonly block: number;
  /** Processes at once. QEMU 7.2's export loses data with several writes in flight: writers are alone. */
  readonly clients: number;
  /** On a new, empty image each time, and a fixed number of bytes instead of a fixed time: a fast server must not run out of holes first. */
  readonly allocates: boolean;
  readonly goals: Goals;
}

const KiB = 1024;
const MiB = 1024 * KiB;

const goals = (overQemu: number, overFloor: number | undefined): Goals => ({
  qemu: overQemu,
  'qemu io_uring': 1,
  floor: overFloor,
});

export const jobs: readonly Job[] = [
  {
    name: 'randread',
    what: '4K random read, 1 job',
    rw: 'randread',
    block: 4 * KiB,
    clients: 1,
    allocates: false,
    goals: goals(2.5, 0.9),
  },
  {
    name: 'randread8',
    what: '4K random read, 8 jobs',
    rw: 'randread',
    block: 4 * KiB,
    clients: 8,
    allocates: false,
    goals: goals(2.5, 0.9),
  },
  {
    name: 'read',
    what: '1M sequential read',
    rw: 'read',
    block: MiB,
    clients: 1,
    allocates: false,
    goals: goals(1.7, 0.9),
  },
  {
    name: 'randwrite',
    what: '4K random write, mapped',
    rw: 'randwrite',
    block: 4 * KiB,
    clients: 1,
    allocates: false,
    goals: goals(1.5, 0.9),
  },
  {
    name: 'write',
    what: '1M sequential write, mapped',
    rw: 'write',
    block: MiB,
    clients: 1,
    allocates: false,
    goals: goals(1.3, 0.9),
  },
  {
    name: 'alloc-randwrite',
    what: '4K random write, allocating',
    rw: 'randwrite',
    block: 4 * KiB,
    clients: 1,
    allocates: true,
    goals: goals(1, undefined),
  },
  {
    name: 'alloc-write',
    what: '1M sequential write, allocating',
    rw: 'write',
    block: MiB,
    clients: 1,
    allocates: true,
    goals: goals(1, undefined),
  },
];

export interface FioOptions {
  readonly seconds: number;
  /** First bytes of the file that are used. */
  readonly span: number;
  /** Keep the client on this core. */
  readonly core: number | undefined;
}

/** An allocating job writes this much for each second that the others run. */
const ALLOCATED_PER_SECOND = { randwrite: 16 * MiB, write: 512 * MiB };

interface FioSide {
  readonly bw_bytes: number;
  readonly iops: number;
}

interface FioReport {
  readonly jobs: readonly { readonly error: number; readonly read: FioSide; readonly write: FioSide }[];
}

/** Requests a second (of 4 KiB jobs) or bytes a second (of 1 MiB jobs). */
export async function fio(job: Job, file: string, options: FioOptions): Promise<number> {
  const sequential = job.rw === 'read' || job.rw === 'write';
  const total = ALLOCATED_PER_SECOND[job.rw === 'write' ? 'write' : 'randwrite'] * options.seconds;
  const report = await run('fio', [
    `--name=${job.name}`,
    `--filename=${file}`,
    `--rw=${job.rw}`,
    `--bs=${job.block}`,
    `--numjobs=${job.clients}`,
    `--size=${options.span}`,
    ...(job.allocates
      ? [`--io_size=${Math.min(total, options.span)}`]
      : // The start of a client and of its server's compiler is not what is compared.
        ['--time_based', '--ramp_time=1', `--runtime=${options.seconds}`]),
    ...(options.core === undefined ? [] : [`--cpus_allowed=${options.core}`]),
    '--direct=1',
    '--ioengine=psync',
    '--randrepeat=1',
    '--norandommap',
    '--group_reporting',
    '--output-format=json',
  ]);
  // Warnings stand before and behind the report.
  const parsed = JSON.parse(report.slice(report.indexOf('{'), report.lastIndexOf('}') + 1)) as FioReport;
  const result = parsed.jobs[0];
  if (result?.error !== 0) throw new Error(`fio ${job.name} on ${file} failed: ${report}`);
  const side = job.rw.endsWith('read') ? result.read : result.write;
  return sequential ? side.bw_bytes : side.iops;
}

/** As people say it: thousands a second, or gigabytes a second. */
export const inWords = (job: Job, value: number): string =>
  job.block === MiB ? `${(value / 1e9).toFixed(2)} GB/s` : `${(value / 1e3).toFixed(1)} k/s`;
