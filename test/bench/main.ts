/**
 * npm run bench: vdskfs against QEMU's FUSE export and against a minimal server in C. Compares and prints; a goal that
 * is missed is a number, not a failure.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { cpus, tmpdir, totalmem, uptime } from 'node:os';
import { join, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { bhyveSizes, measureBhyve, reportBhyve } from './bhyve-pause.ts';
import { measureChain } from './chain.ts';
import { checkpointSizes, measureCheckpoints, reportCheckpoints } from './checkpoints.ts';
import { measureCopy } from './copy.ts';
import { guestSizes, measureGuest, reportGuests } from './guest-pause.ts';
import { type Job, jobs } from './jobs.ts';
import { holdInPageCache } from './page-cache.ts';
import { endEverything, run } from './processes.ts';
import { compileFloor, floor, type Images, qemu, type Server, vdskfs } from './servers.ts';
import { median, table } from './statistics.ts';
import {
  type Footprint,
  makeImages,
  measure,
  type Rounds,
  report,
  reportPinned,
  type Throughput,
  WRITTEN_BYTES,
} from './throughput.ts';

const OTHERS = ['copy', 'chain', 'checkpoints', 'guests', 'memory'];
const NAMES = [...jobs.map(({ name }) => name), ...OTHERS];

const HELP = `npm run bench -- [options]

  --rounds N       how often each server has its turn at each row (default 3); medians are shown
  --seconds N      how long fio runs each time (default 4)
  --only A,B       only these rows: ${NAMES.join(', ')}
  --pin            the one-job rows once more with the client kept on one core
  --quick          one round of a second each, the smaller checkpoints and guests only: to see that it works
  --dir DIR        where the images are made (default: the system's temporary folder); needs 12 GiB

The images that fio reads and writes are locked in the page cache, I/O is direct, one server runs at a time and they take
turns; the first second of a turn does not count, but where it allocates. vdskfs opens live files with FOPEN_DIRECT_IO and
FOPEN_PARALLEL_DIRECT_WRITES, and so does the floor (floor.c); QEMU chooses its own.

example: npm run bench -- --only randread,randread8 --rounds 5
`;

interface Options extends Rounds {
  readonly chosen: ReadonlySet<string>;
  readonly pin: boolean;
  readonly quick: boolean;
  readonly directory: string;
}

/** @throws with what is wrong and what to write instead */
function parse(words: readonly string[]): Options | 'help' {
  const { values } = parseArgs({
    args: [...words],
    options: {
      rounds: { type: 'string' },
      seconds: { type: 'string' },
      only: { type: 'string' },
      pin: { type: 'boolean', default: false },
      quick: { type: 'boolean', default: false },
      dir: { type: 'string', default: tmpdir() },
      help: { type: 'boolean', default: false },
    },
  });
  if (values.help) return 'help';
  const chosen = values.only === undefined ? NAMES : values.only.split(',');
  const unknown = chosen.find((name) => !NAMES.includes(name));
  if (unknown !== undefined) throw new Error(`--only: there is no row "${unknown}"; there are ${NAMES.join(', ')}`);
  return {
    rounds: positive('--rounds', values.rounds ?? (values.quick ? '1' : '3')),
    seconds: positive('--seconds', values.seconds ?? (values.quick ? '1' : '4')),
    chosen: new Set(chosen),
    pin: values.pin,
    quick: values.quick,
    directory: resolve(values.dir),
    say: (line) => void process.stderr.write(`${line}\n`),
  };
}

function positive(option: string, text: string): number {
  if (!/^[1-9]\d*$/.test(text)) throw new Error(`${option}: "${text}" is no whole number above 0`);
  return Number(text);
}

const print = (text: string): void => void process.stdout.write(`${text}\n\n`);

/** Those that work on this host; why another does not is said. @throws if vdskfs does not: nothing is left to compare */
async function availableServers(
  images: Images,
  own: Server,
  root: string,
  directory: string,
  say: Rounds['say'],
): Promise<Server[]> {
  const others: [string, () => Promise<Server>][] = [
    ['QEMU, aio=threads', async () => qemu('threads')],
    ['QEMU, aio=io_uring', async () => qemu('io_uring')],
    ['the floor', async () => floor(await compileFloor(join(root, 'test/bench/floor.c'), directory))],
  ];
  const working: Server[] = [];
  for (const [name, make] of others) {
    try {
      const server = await make();
      await server.serve(images, async () => {});
      working.push(server);
    } catch (error) {
      say(`left out: ${name}: ${error instanceof Error ? error.message : error}`);
    }
  }
  await own.serve(images, async () => {});
  return [...working, own];
}

function reportFootprint({ memory, mountMs }: Footprint, servers: readonly Server[]): string {
  return table([
    ['server', ...servers.map(({ name }) => name), 'goal for vdskfs'],
    [
      'most memory',
      ...servers.map(({ name }) => `${Math.round((memory.get(name) ?? 0) / 2 ** 20)} MiB`),
      'under 238 MiB (250 MB)',
    ],
    ['mount', ...servers.map(({ name }) => `${Math.round(median(mountMs.get(name) ?? []))} ms`), 'under 500 ms'],
  ]);
}

/** The rows of fio. */
async function compare(
  wanted: readonly Job[],
  options: Options,
  own: Server,
  root: string,
  directory: string,
): Promise<void> {
  options.say('making the images');
  const images = await makeImages(directory);
  using held = holdInPageCache([
    { path: images.qcow2 },
    { path: images.raw.path, bytes: images.raw.start + WRITTEN_BYTES },
  ]);
  for (const path of held.failed)
    options.say(`${path} is not locked in memory: run as root, or raise the limit (ulimit -l)`);
  const servers = await availableServers(images, own, root, directory, options.say);
  const footprint: Footprint = { memory: new Map(), mountMs: new Map() };
  const rounds = async (jobs: readonly Job[], core: number | undefined): Promise<Throughput[]> => {
    const rows: Throughput[] = [];
    for (const job of jobs) rows.push(await measure(job, servers, { images, directory, core, footprint }, options));
    return rows;
  };
  const rows = await rounds(wanted, undefined);
  print(report(rows, servers));
  print(reportFootprint(footprint, servers));
  if (options.pin) {
    const single = wanted.filter(({ clients }) => clients === 1);
    print(reportPinned(rows, await rounds(single, 0), servers));
  }
}

async function bench(options: Options, root: string, directory: string): Promise<void> {
  const { chosen } = options;
  const wanted = jobs.filter(({ name }) => chosen.has(name));
  print(
    `${cpus().length} cores, ${cpus()[0]?.model.trim()}; ${Math.round(totalmem() / 2 ** 30)} GiB; up ${Math.round(uptime() / 60)} min; ` +
      `${(await run('uname', ['-sr'])).trim()}; Node ${process.version}; ${(await run('qemu-img', ['--version'])).split('\n')[0]}`,
  );
  const own = vdskfs(join(root, 'bin/vdskfs'));
  if (wanted.length > 0) await compare(wanted, options, own, root, directory);
  if (chosen.has('chain')) print(await measureChain(own, [qemu('threads')], directory, options));
  if (chosen.has('copy')) print(await measureCopy(own, directory, options));
  if (chosen.has('checkpoints')) {
    const sizes = options.quick ? checkpointSizes.slice(0, 1) : checkpointSizes;
    const rows: string[][] = [];
    for (const size of sizes) {
      const { rows: measured, mountMs, memory } = await measureCheckpoints(size, own, directory, options);
      rows.push(...measured);
      print(
        `vdskfs on ${size.name}: mounts in ${Math.round(mountMs)} ms, needs ${Math.round(memory / 2 ** 20)} MiB at most`,
      );
    }
    print(reportCheckpoints(rows));
  }
  if (chosen.has('guests')) {
    const sizes = options.quick ? bhyveSizes.slice(0, 2) : bhyveSizes;
    const rows: string[][] = [];
    for (const size of sizes) {
      const source = join(root, 'test/stand-in/bhyve.c');
      rows.push(await measureBhyve(size, join(root, 'bin/vdskfs'), source, directory, options));
    }
    print(reportBhyve(rows));
  }
  if (chosen.has('memory')) {
    const rows: string[][] = [];
    const sizes = options.quick ? guestSizes.slice(0, 1) : guestSizes;
    for (const size of sizes) rows.push(await measureGuest(size, join(root, 'bin/vdskfs'), directory, options));
    print(reportGuests(rows));
  }
}

async function main(): Promise<void> {
  const options = parse(process.argv.slice(2));
  if (options === 'help') {
    process.stdout.write(HELP);
    return;
  }
  const directory = await mkdtemp(join(options.directory, 'vdskfs-bench-'));
  process.on('exit', endEverything);
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.once(signal, () => {
      endEverything();
      void rm(directory, { recursive: true, force: true }).finally(() => process.exit(1));
    });
  }
  try {
    await bench(options, process.cwd(), directory);
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

try {
  await main();
} catch (error) {
  process.stderr.write(`bench: ${error instanceof Error ? error.message : error}\n`);
  process.exitCode = 1;
}
