/** Taking, applying and deleting a checkpoint of a big, fully mapped disk: vdskfs at work against qemu-img at rest. */
import { mkdir, rm, rmdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { nextMessage, type Running, run, start, stop, timed } from './processes.ts';
import type { Served, Server } from './servers.ts';
import type { Stall } from './stall-writer.ts';
import { median, table } from './statistics.ts';
import type { Rounds } from './throughput.ts';

const GiB = 2 ** 30;
/** The writer stays in this much of the disk. */
const SPAN = 2 * GiB;
/** The writer runs this long by itself, to know its longest wait without any checkpoint. */
const QUIET_MS = 1000;

export interface CheckpointSize {
  readonly name: string;
  readonly bytes: number;
  /** Longest stall that is hoped for, as a part of qemu-img's time. */
  readonly stallGoal: number;
}

export const checkpointSizes: readonly CheckpointSize[] = [
  { name: '256 GiB', bytes: 256 * GiB, stallGoal: 1 },
  { name: '1 TiB', bytes: 1024 * GiB, stallGoal: 0.5 },
];

const operations = ['take', 'rollback', 'delete'] as const;
type OperationName = (typeof operations)[number];
const commands: Record<OperationName, { readonly qemu: string; readonly vdskfs: string }> = {
  take: { qemu: 'snapshot -c', vdskfs: 'mkdir' },
  rollback: { qemu: 'snapshot -a', vdskfs: 'rollback' },
  delete: { qemu: 'snapshot -d', vdskfs: 'rmdir' },
};

interface Sample {
  readonly qemuMs: number;
  readonly vdskfsMs: number;
  /** Longest wait of a writer meanwhile; none where there must be no writer. */
  readonly stallMs: number | undefined;
  /** Longest wait of the writer before that. */
  readonly quietMs: number | undefined;
}

/** Measure one size. @returns rows of the report, and vdskfs's mount time in milliseconds and most memory in bytes */
export async function measureCheckpoints(
  size: CheckpointSize,
  server: Server,
  directory: string,
  { rounds, say }: Rounds,
): Promise<{ readonly rows: string[][]; readonly mountMs: number; readonly memory: number }> {
  const image = join(directory, 'mapped.qcow2');
  const samples: Record<OperationName, Sample[]> = { take: [], rollback: [], delete: [] };
  const mountTimes: number[] = [];
  let memory = 0;
  const quiet: number[] = [];
  try {
    await run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'preallocation=metadata', image, String(size.bytes)]);
    for (let round = 0; round < rounds; round++) {
      const qemuMs = {
        take: await timed(() => run('qemu-img', ['snapshot', '-c', 'bench', image])),
        rollback: await timed(() => run('qemu-img', ['snapshot', '-a', 'bench', image])),
        delete: await timed(() => run('qemu-img', ['snapshot', '-d', 'bench', image])),
      };
      await server.serve({ qcow2: image, size: size.bytes }, async (served) => {
        mountTimes.push(served.mountMs);
        for (const operation of operations) {
          const measured = await perform(operation, served);
          if (measured.quietMs !== undefined) quiet.push(measured.quietMs);
          samples[operation].push({ qemuMs: qemuMs[operation], ...measured });
        }
        memory = Math.max(memory, served.peakMemory());
      });
      say(`checkpoints of ${size.name}: round ${round + 1} of ${rounds}`);
    }
  } finally {
    await rm(image, { force: true });
  }
  const rows = operations.map((operation) => rowOf(size, operation, samples[operation], median(quiet)));
  return { rows, mountMs: median(mountTimes), memory };
}

/** One operation of vdskfs, with a writer at work where that is allowed: nobody may have the disk open when it is rolled back. */
async function perform(operation: OperationName, { directory, file }: Served): Promise<Omit<Sample, 'qemuMs'>> {
  const path = join(directory, 'snapshots', 'bench');
  if (operation === 'rollback') {
    const rollback = () => writeFile(join(directory, 'control'), 'rollback bench', { flag: 'r+' });
    return { vdskfsMs: await timed(rollback), stallMs: undefined, quietMs: undefined };
  }
  return withWriter(file, async (writer) => {
    await delay(QUIET_MS);
    const { longestMs: quietMs } = await writer.stall();
    const vdskfsMs = await timed(() => (operation === 'take' ? mkdir(path) : rmdir(path)));
    const { longestMs: stallMs, error } = await writer.stall();
    if (error !== undefined) throw new Error(`${commands[operation].vdskfs}: the writer failed meanwhile: ${error}`);
    return { vdskfsMs, stallMs, quietMs };
  });
}

const seconds = (ms: number): string => `${(ms / 1000).toFixed(3)} s`;

function rowOf(size: CheckpointSize, operation: OperationName, samples: readonly Sample[], quietMs: number): string[] {
  const qemuMs = median(samples.map((sample) => sample.qemuMs));
  const vdskfsMs = median(samples.map((sample) => sample.vdskfsMs));
  const stalls = samples.flatMap(({ stallMs }) => stallMs ?? []);
  const stallMs = Math.max(...stalls);
  const stall = [
    seconds(stallMs),
    `${(stallMs / qemuMs).toFixed(2)}x (goal ${size.stallGoal.toFixed(1)})`,
    seconds(quietMs),
  ];
  return [
    `${size.name}: ${commands[operation].vdskfs} against ${commands[operation].qemu}`,
    seconds(qemuMs),
    seconds(vdskfsMs),
    `${(vdskfsMs / qemuMs).toFixed(2)}x`,
    ...(stalls.length > 0 ? stall : ['no writer', '', '']),
  ];
}

export const reportCheckpoints = (rows: readonly (readonly string[])[]): string =>
  table([
    ['checkpoints', 'qemu-img', 'vdskfs', 'vdskfs / qemu-img', 'longest stall', 'stall / qemu-img', 'stall before'],
    ...rows,
  ]);

interface Writer {
  /** What it saw since the last call. */
  stall(): Promise<Stall>;
}

async function withWriter<T>(file: string, body: (writer: Writer) => Promise<T>): Promise<T> {
  const program = fileURLToPath(new URL('./stall-writer.js', import.meta.url));
  const child: Running = start(process.execPath, [program, file, String(SPAN)], {
    stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
  });
  const failed = child.ended.then(({ status, signal }) => {
    throw new Error(`the writer ended: ${signal ?? status}\n${child.output()}`);
  });
  failed.catch(() => {}); // it ends by our signal too, when nobody waits for it any more
  const stall = async (): Promise<Stall> => {
    const answer = nextMessage<Stall>(child.process);
    child.process.send('stall');
    return Promise.race([answer, failed]);
  };
  try {
    await stall(); // it is there, and its start is not counted
    return await body({ stall });
  } finally {
    await stop(child);
  }
}
