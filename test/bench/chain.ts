/** A long chain of overlays: mounting it, and random reads, beside QEMU on the same chain and beside one image with the same contents. */
import { readdir, rm } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { fio, inWords, type Job, jobs } from './jobs.ts';
import { holdInPageCache } from './page-cache.ts';
import { run } from './processes.ts';
import type { Images, Server } from './servers.ts';
import { median, table } from './statistics.ts';
import type { Rounds } from './throughput.ts';

const MiB = 1 << 20;
const DISK_BYTES = 1024 * MiB;
const CLUSTER_BYTES = 65_536;
const LAYERS = 200;
/** Clusters written in each layer: in the end about half of the disk comes from above the base, from everywhere in the chain. */
const CLUSTERS_PER_LAYER = 64;

/** What is measured of one server on one image. */
interface Sample {
  readonly mountMs: number[];
  readonly memory: number[];
  /** By job name. */
  readonly reads: Map<string, number[]>;
}

/** Layers are made by themselves and put over each other afterwards: QEMU would open the whole chain for each. */
async function makeChain(directory: string): Promise<Images> {
  const names = Array.from({ length: LAYERS }, (_, index) => `layer${String(index).padStart(3, '0')}.qcow2`);
  const clusters = DISK_BYTES / CLUSTER_BYTES;
  let state = 1;
  for (const [index, name] of names.entries()) {
    const path = join(directory, name);
    await run('qemu-img', ['create', '-q', '-f', 'qcow2', path, String(DISK_BYTES)]);
    const writes: string[] = [];
    if (index === 0) {
      for (let part = 0; part < 4; part++) writes.push(`write -q -P ${part + 1} ${part * 256}M 256M`);
    }
    for (let count = 0; count < CLUSTERS_PER_LAYER && index > 0; count++) {
      state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
      writes.push(`write -q -P ${(index % 250) + 1} ${(state % clusters) * CLUSTER_BYTES} ${CLUSTER_BYTES}`);
    }
    await run('qemu-io', ['-f', 'qcow2', ...writes.flatMap((command) => ['-c', command]), path]);
    if (index > 0) await run('qemu-img', ['rebase', '-u', '-b', names[index - 1] as string, '-F', 'qcow2', path]);
  }
  return { qcow2: join(directory, names.at(-1) as string), size: DISK_BYTES };
}

/** Vdskfs on the chain, QEMU on the chain, vdskfs on one image. @returns the report */
export async function measureChain(
  own: Server,
  others: readonly Server[],
  directory: string,
  { rounds, seconds, say }: Rounds,
): Promise<string> {
  say(`making a chain of ${LAYERS} layers`);
  const chain = await makeChain(directory);
  const single: Images = { ...chain, qcow2: join(directory, 'single.qcow2') };
  await run('qemu-img', ['convert', '-O', 'qcow2', chain.qcow2, single.qcow2]);
  const layers = (await readdir(directory)).filter((name) => name.startsWith('layer'));
  using _held = holdInPageCache([...layers, basename(single.qcow2)].map((name) => ({ path: join(directory, name) })));
  const reading = jobs.filter(({ rw }) => rw === 'randread');
  const columns: [string, Server, Images][] = [
    [`${own.name}, one image`, own, single],
    [`${own.name}, ${LAYERS} layers`, own, chain],
    ...others.map((server): [string, Server, Images] => [`${server.name}, ${LAYERS} layers`, server, chain]),
  ];
  const samples = columns.map((): Sample => ({ mountMs: [], memory: [], reads: new Map() }));
  for (let round = 0; round < rounds; round++) {
    for (const [index, [, server, images]] of columns.entries()) {
      const sample = samples[index] as Sample;
      await server.serve(images, async (served) => {
        sample.mountMs.push(served.mountMs);
        for (const job of reading) {
          const value = await fio(job, served.file, { seconds, span: DISK_BYTES, core: undefined });
          sample.reads.set(job.name, [...(sample.reads.get(job.name) ?? []), value]);
        }
        sample.memory.push(served.peakMemory());
      });
    }
    say(`chain: round ${round + 1} of ${rounds}`);
  }
  await rm(chain.qcow2);
  return report(
    columns.map(([name]) => name),
    samples,
    reading,
  );
}

function report(names: readonly string[], samples: readonly Sample[], reading: readonly Job[]): string {
  const [single, chain] = samples as [Sample, Sample];
  const rows = reading.map((job) => {
    const of = (sample: Sample): number => median(sample.reads.get(job.name) ?? []);
    return [
      job.what,
      ...samples.map((sample) => inWords(job, of(sample))),
      `${(of(single) / of(chain)).toFixed(2)}x (goal at most 1.30x)`,
    ];
  });
  return table([
    [`a chain of ${LAYERS} layers`, ...names, 'slower than one image'],
    ...rows,
    ['mount', ...samples.map(({ mountMs }) => `${Math.round(median(mountMs))} ms`), '(goal under 2000 ms)'],
    ['most memory', ...samples.map(({ memory }) => `${Math.round(Math.max(...memory) / MiB)} MiB`), ''],
  ]);
}
