/**
 * How long a QEMU guest stands still for a checkpoint with its memory, against the time to write as much to a plain
 * file. All of the memory is random bytes: what is zero costs nothing. The guest is firmware that waits.
 */
import { mkdir, open, rm, rmdir } from 'node:fs/promises';
import { connect, type Socket } from 'node:net';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { type Running, run, start, stop, timed } from './processes.ts';
import { vdskfs } from './servers.ts';
import { median, table } from './statistics.ts';
import type { Rounds } from './throughput.ts';

const MiB = 2 ** 20;
const GiB = 2 ** 30;
const READY_MS = 20_000;
const GOAL = 1.5;

export interface GuestSize {
  readonly memory: number;
  /** Of the disk, all of it mapped. */
  readonly disk: number;
}

/** The pause grows with the memory, and not with the disk. */
export const guestSizes: readonly GuestSize[] = [
  { memory: 256 * MiB, disk: GiB },
  { memory: GiB, disk: GiB },
  { memory: GiB, disk: 256 * GiB },
];

/** @returns a row of the report */
export async function measureGuest(
  { memory, disk }: GuestSize,
  launcher: string,
  directory: string,
  { rounds, say }: Rounds,
): Promise<string[]> {
  const path = (name: string) => join(directory, name);
  const name = `${memory / MiB} MiB of memory, disk of ${disk / GiB} GiB`;
  const [image, ram, socket] = [path('guest.qcow2'), path('ram'), path('vdskfs.sock')];
  const plainMs: number[] = [];
  const pauseMs: number[] = [];
  const mkdirMs: number[] = [];
  try {
    await run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'preallocation=metadata', image, String(disk)]);
    await run('dd', ['if=/dev/urandom', `of=${ram}`, 'bs=1M', `count=${memory / MiB}`, 'status=none']);
    const server = vdskfs(launcher, ['--guest', `guest=qmp:${socket}`]);
    await server.serve({ qcow2: image, size: disk }, async ({ file, directory: served }) => {
      const qemu = start('qemu-system-x86_64', [
        ...['-name', 'bench', '-accel', 'tcg', '-machine', 'pc,memory-backend=ram', '-m', `${memory / MiB}`],
        ...['-object', `memory-backend-file,id=ram,size=${memory},mem-path=${ram},share=off`],
        ...['-nodefaults', '-no-user-config', '-display', 'none', '-drive', `file=${file},format=raw,if=virtio`],
        ...['-qmp', `unix:${socket},server=on,wait=off`, '-qmp', `unix:${path('events.sock')},server=on,wait=off`],
      ]);
      try {
        const pauses = await watchPauses(path('events.sock'), qemu);
        for (let round = 0; round < rounds; round++) {
          plainMs.push(await timed(() => writePlain(ram, path('plain'), memory)));
          await rm(path('plain'));
          const checkpoint = join(served, 'snapshots', 'bench');
          mkdirMs.push(await timed(() => mkdir(checkpoint)));
          pauseMs.push(await pauses.next());
          await rmdir(checkpoint);
          say(`checkpoint with ${name}: round ${round + 1} of ${rounds}`);
        }
        pauses.end();
      } finally {
        await stop(qemu);
      }
    });
  } finally {
    for (const file of [image, ram, path('plain')]) await rm(file, { force: true });
  }
  const [plain, pause] = [median(plainMs), median(pauseMs)];
  const ratio = `${(pause / plain).toFixed(2)}x (goal ${GOAL})`;
  return [name, seconds(plain), seconds(pause), ratio, seconds(median(mkdirMs))];
}

export const reportGuests = (rows: readonly (readonly string[])[]): string =>
  table([['checkpoints of a running guest', 'plain file', 'guest stands still', 'pause / plain', 'mkdir'], ...rows]);

const seconds = (ms: number): string => `${(ms / 1000).toFixed(3)} s`;

/** What is in `from`, to a new file, in pieces of 1 MiB. It is in the page cache. */
async function writePlain(from: string, to: string, bytes: number): Promise<void> {
  await using source = await open(from, 'r');
  await using target = await open(to, 'wx');
  const piece = Buffer.alloc(MiB);
  for (let at = 0; at < bytes; at += MiB) {
    await source.read(piece, 0, MiB, at);
    await target.write(piece, 0, MiB, at);
  }
}

interface Pauses {
  /** Milliseconds that the guest stood still; those that were not asked for yet, in their order. */
  next(): Promise<number>;
  end(): void;
}

/** By the times that QEMU itself gives for STOP and RESUME. */
async function watchPauses(socketPath: string, qemu: Running): Promise<Pauses> {
  const events = await connected(socketPath, qemu);
  const pauses: number[] = [];
  let stopped = 0;
  let rest = '';
  events.write('{"execute": "qmp_capabilities"}\n');
  events.on('data', (chunk: Buffer) => {
    const lines = `${rest}${chunk}`.split('\n');
    rest = lines.pop() ?? '';
    for (const line of lines) {
      const { event, timestamp } = JSON.parse(line) as {
        event?: string;
        timestamp?: { seconds: number; microseconds: number };
      };
      if (timestamp === undefined) continue;
      const ms = timestamp.seconds * 1000 + timestamp.microseconds / 1000;
      if (event === 'STOP') stopped = ms;
      if (event === 'RESUME') pauses.push(ms - stopped);
    }
  });
  return {
    async next() {
      for (const deadline = performance.now() + READY_MS; pauses.length === 0; await delay(5)) {
        if (performance.now() > deadline) throw new Error(`the guest was not paused: ${qemu.output()}`);
      }
      return pauses.shift() as number;
    },
    end: () => void events.destroy(),
  };
}

async function connected(path: string, qemu: Running): Promise<Socket> {
  for (const deadline = performance.now() + READY_MS; ; await delay(20)) {
    const socket = connect(path);
    const error = await new Promise<Error | undefined>((resolve) => {
      socket.once('connect', () => resolve(undefined));
      socket.once('error', resolve);
    });
    if (error === undefined) return socket;
    if (qemu.hasEnded() || performance.now() > deadline) throw new Error(`QEMU: ${error.message}\n${qemu.output()}`);
  }
}
