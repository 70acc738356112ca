/** The servers that are compared. Each shows an image as a raw file; one runs at a time. */
import { mkdir, mkdtemp, rm, stat, writeFile } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { mounting, peakMemory, type Running, run, start, stop, unmounted } from './processes.ts';

/** A raw file with the disk from byte `start` on. */
export interface RawFile {
  readonly path: string;
  readonly start: number;
}

/** The files to serve: the same contents in both. */
export interface Images {
  readonly qcow2: string;
  /** For servers that know no format. */
  readonly raw?: RawFile;
  /** Bytes of the disk. */
  readonly size: number;
}

export interface Served {
  /** The raw view. */
  readonly file: string;
  /** Where vdskfs shows its tree: the directory of `file`. */
  readonly directory: string;
  /** Milliseconds from the start of the server until the file answers. */
  readonly mountMs: number;
  /** Most memory so far, in bytes. */
  peakMemory(): number;
}

export interface Server {
  readonly name: string;
  /** Serve for as long as `body` runs. */
  serve<T>(images: Images, body: (served: Served) => Promise<T>): Promise<T>;
}

const READY_MS = 60_000;

/** What is mounted where, and what shall answer. */
interface Plan {
  readonly command: string;
  readonly args: readonly string[];
  readonly mountpoint: string;
  readonly file: string;
  readonly size: number;
  readonly env?: NodeJS.ProcessEnv;
}

/** Start a server, wait until the file answers with the size it should have, run `body`, stop the server. */
async function serve<T>(plan: Plan, body: (served: Served) => Promise<T>): Promise<T> {
  mounting(plan.mountpoint);
  const began = performance.now();
  const server = start(plan.command, plan.args, plan.env === undefined ? {} : { env: plan.env });
  try {
    await answering(server, plan);
    const mountMs = performance.now() - began;
    return await body({
      file: plan.file,
      directory: dirname(plan.file),
      mountMs,
      peakMemory: () => peakMemory(server.pid),
    });
  } finally {
    await stop(server);
    unmounted(plan.mountpoint);
  }
}

async function answering(server: Running, plan: Plan): Promise<void> {
  const deadline = performance.now() + READY_MS;
  for (;;) {
    const size = await stat(plan.file).then(
      (found) => found.size,
      () => -1, // not there yet
    );
    if (size === plan.size) return;
    if (server.hasEnded()) throw new Error(`${plan.command} ended before it served: ${server.output().trim()}`);
    if (performance.now() > deadline)
      throw new Error(`${plan.command} does not serve ${plan.file}: ${server.output()}`);
    await delay(2);
  }
}

/** A fresh directory beside the image, gone afterwards. */
async function withMountpoint<T>(image: string, body: (mountpoint: string) => Promise<T>): Promise<T> {
  const mountpoint = await mkdtemp(join(dirname(image), 'mnt-'));
  try {
    return await body(mountpoint);
  } finally {
    await rm(mountpoint, { recursive: true, force: true });
  }
}

/** qemu-storage-daemon's FUSE export, which is mounted over a file. */
export function qemu(aio: 'threads' | 'io_uring'): Server {
  return {
    name: aio === 'threads' ? 'qemu' : 'qemu io_uring',
    serve: (images, body) =>
      withMountpoint(images.qcow2, async (directory) => {
        const file = join(directory, 'disk.raw');
        await writeFile(file, '');
        const args = [
          ...['--blockdev', `driver=file,node-name=file,filename=${images.qcow2},aio=${aio}`],
          ...['--blockdev', 'driver=qcow2,node-name=disk,file=file'],
          ...['--export', `type=fuse,id=export,node-name=disk,mountpoint=${file},writable=on`],
        ];
        return serve({ command: 'qemu-storage-daemon', args, mountpoint: file, file, size: images.size }, body);
      }),
  };
}

/** The compiled floor.c on a raw file. */
export const floor = (program: string): Server => ({
  name: 'floor',
  serve: async ({ raw, size }, body) => {
    if (raw === undefined) throw new Error('there is no raw file for the floor to serve');
    return withMountpoint(raw.path, (mountpoint) => {
      const args = [raw.path, String(raw.start), mountpoint];
      return serve({ command: program, args, mountpoint, file: join(mountpoint, 'disk.raw'), size }, body);
    });
  },
});

/** vdskfs with its native driver. `launcher`: bin/vdskfs; `options`: more words for mount. */
export const vdskfs = (launcher: string, options: readonly string[] = [], env = process.env): Server => ({
  name: 'vdskfs',
  serve: (images, body) =>
    withMountpoint(images.qcow2, (mountpoint) =>
      serve(
        {
          command: process.execPath,
          args: [launcher, 'mount', '--foreground', '--driver', 'native', ...options, images.qcow2, mountpoint],
          env,
          mountpoint,
          file: join(mountpoint, basename(images.qcow2, '.qcow2'), 'disk.raw'),
          size: images.size,
        },
        body,
      ),
    ),
});

/** Compile floor.c into `directory`. @throws where gcc, pkg-config or libfuse 3 is missing */
export async function compileFloor(source: string, directory: string): Promise<string> {
  await mkdir(directory, { recursive: true });
  const program = join(directory, 'floor');
  const flags = (await run('pkg-config', ['--cflags', '--libs', 'fuse3'])).trim().split(/\s+/);
  await run('gcc', ['-O2', '-o', program, source, ...flags]);
  return program;
}
