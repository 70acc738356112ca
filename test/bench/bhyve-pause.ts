/**
 * How long a guest of bhyve stands still for a checkpoint with its memory: the stand-in for bhyve saves to a plain folder, and to a
 * mounted disk that it runs on. It measures its pause itself.
 */
import { mkdir, rm, rmdir, symlink, writeFile } from 'node:fs/promises';
import { delimiter, join } from 'node:path';
import { type Running, run, start, stop, timed } from './processes.ts';
import { type Server, vdskfs } from './servers.ts';
import { median, table } from './statistics.ts';
import type { Rounds } from './throughput.ts';

const MiB = 2 ** 20;
const GiB = 2 ** 30;
/** Pause of a writer of the guest between two writes, in microseconds: it works, but leaves the cores to what is measured. */
const WRITER_DELAY_US = '500';

export interface BhyveSize {
  readonly memoryBytes: number;
  readonly disk: { readonly name: string; readonly bytes: number; readonly mapped: boolean };
}

const small = { name: 'a small disk', bytes: 2 * GiB, mapped: false };
const big = { name: '256 GiB, all mapped', bytes: 256 * GiB, mapped: true };

export const bhyveSizes: readonly BhyveSize[] = [
  { memoryBytes: 256 * MiB, disk: small },
  { memoryBytes: 256 * MiB, disk: big },
  { memoryBytes: 1 * GiB, disk: small },
  { memoryBytes: 1 * GiB, disk: big },
];

/** Longest pause that is hoped for, as a multiple of the one for a plain file. */
const GOAL = 1.5;

interface Sample {
  readonly plainMs: number;
  readonly pauseMs: number;
  /** The whole mkdir: until the checkpoint is durable. */
  readonly wholeMs: number;
}

/** A host with bhyve, in a folder. */
interface Host {
  readonly bin: string;
  readonly runDirectory: string;
  readonly env: NodeJS.ProcessEnv;
}

async function installBhyve(source: string, directory: string): Promise<Host> {
  const bin = join(directory, 'bin');
  const runDirectory = join(directory, 'run');
  await mkdir(bin);
  await mkdir(runDirectory);
  await run('cc', ['-O2', '-pthread', '-o', join(bin, 'bhyve'), source]);
  await symlink('bhyve', join(bin, 'bhyvectl'));
  await writeFile(join(bin, 'sysctl'), '#!/bin/sh\necho 1400097\n', { mode: 0o755 });
  const env = {
    ...process.env,
    PATH: `${bin}${delimiter}${process.env.PATH}`,
    BHYVE_GENERATION: 'D',
    BHYVE_DELAY_US: WRITER_DELAY_US,
    VDSKFS_BHYVE_RUNDIR: runDirectory,
  };
  return { bin, runDirectory, env };
}

/** Measure one size. @param source of the stand-in */
export async function measureBhyve(
  size: BhyveSize,
  launcher: string,
  source: string,
  directory: string,
  { rounds, say }: Rounds,
): Promise<string[]> {
  const place = join(directory, 'guest');
  const samples: Sample[] = [];
  try {
    await mkdir(join(place, 'plain'), { recursive: true });
    const host = await installBhyve(source, place);
    const image = join(place, 'disk.qcow2');
    const preallocation = size.disk.mapped ? 'metadata' : 'off';
    const options = ['-q', '-f', 'qcow2', '-o', `preallocation=${preallocation}`];
    await run('qemu-img', ['create', ...options, image, String(size.disk.bytes)]);
    const name = `bench${process.pid}`;
    const server: Server = vdskfs(launcher, ['--guest', `disk=bhyve:${name}`], host.env);
    await server.serve({ qcow2: image, size: size.disk.bytes }, async (served) => {
      await withGuest(host, name, size, served.file, async (guest) => {
        for (let round = 0; round < rounds; round++) {
          samples.push(await measureOnce(host, guest, name, join(place, 'plain'), served.directory));
          say(`guest of ${size.memoryBytes / MiB} MiB on ${size.disk.name}: round ${round + 1} of ${rounds}`);
        }
      });
    });
  } finally {
    await rm(place, { recursive: true, force: true });
  }
  return rowOf(size, samples);
}

async function measureOnce(host: Host, guest: Running, name: string, plain: string, disk: string): Promise<Sample> {
  const plainMs = await pauseOf(guest, () =>
    run(join(host.bin, 'bhyvectl'), [
      `--vm=${name}`,
      `--rundir=${host.runDirectory}`,
      `--checkpoint=${join(plain, 'state')}`,
    ]),
  );
  for (const ending of ['', '.kern', '.meta']) await rm(join(plain, `state${ending}`));
  const checkpoint = join(disk, 'snapshots', 'bench');
  let wholeMs = 0;
  const pauseMs = await pauseOf(guest, async () => {
    wholeMs = await timed(() => mkdir(checkpoint));
  });
  await rmdir(checkpoint);
  // What the host still has to write would slow the next one down.
  await run('sync', []);
  return { plainMs, pauseMs, wholeMs };
}

/** Milliseconds that the guest says it was paused for the checkpoint that `ask` asks for. */
async function pauseOf(guest: Running, ask: () => Promise<unknown>): Promise<number> {
  const before = pauses(guest).length;
  await ask();
  const pause = await said(guest, () => pauses(guest)[before]);
  return Number(pause);
}

const pauses = (guest: Running): string[] =>
  Array.from(guest.output().matchAll(/^paused (.*)$/gm), (line) => line[1] ?? '');

/** What `find` finds in the guest's output, waited for. @throws if the guest ends before */
async function said<T>(guest: Running, find: () => T | undefined): Promise<T> {
  for (;;) {
    const found = find();
    if (found !== undefined) return found;
    if (guest.hasEnded()) throw new Error(`the guest ended:\n${guest.output()}`);
    await Promise.race([guest.ended, new Promise((resolve) => guest.process.stdout?.once('data', resolve))]);
  }
}

async function withGuest<T>(
  host: Host,
  name: string,
  { memoryBytes }: BhyveSize,
  file: string,
  body: (guest: Running) => Promise<T>,
): Promise<T> {
  const args = ['-o', `rundir=${host.runDirectory}`, '-m', String(memoryBytes), '-s', `3,virtio-blk,${file}`, name];
  const guest = start(join(host.bin, 'bhyve'), args, { env: host.env });
  try {
    await said(guest, () => /^ready$/m.exec(guest.output()) ?? undefined);
    return await body(guest);
  } finally {
    await stop(guest);
  }
}

const milliseconds = (values: readonly number[]): string => `${Math.round(median(values))} ms`;

function rowOf(size: BhyveSize, samples: readonly Sample[]): string[] {
  const plain = samples.map(({ plainMs }) => plainMs);
  const pause = samples.map(({ pauseMs }) => pauseMs);
  return [
    `${size.memoryBytes / MiB} MiB, ${size.disk.name}`,
    milliseconds(plain),
    milliseconds(pause),
    `${(median(pause) / median(plain)).toFixed(2)}x (goal ${GOAL})`,
    milliseconds(samples.map(({ wholeMs }) => wholeMs)),
  ];
}

export const reportBhyve = (rows: readonly (readonly string[])[]): string =>
  table([['bhyve: memory, disk', 'pause, plain file', 'pause, vdskfs', 'vdskfs / plain', 'mkdir'], ...rows]);
