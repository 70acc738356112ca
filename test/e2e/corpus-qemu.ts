/** qemu-img and qemu-io as the second opinion: they make the images, and say what is in them. */
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { closeSync, mkdtempSync, openSync, readdirSync, readSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { SparseModel } from './corpus-model.ts';

const READ_BYTES = 1 << 20;

/** Run a tool of QEMU and return its standard output. @throws Error with all that the tool said, if it failed */
function run(tool: string, args: readonly string[], cwd: string): string {
  const done = spawnSync(tool, args, { cwd, encoding: 'utf8', maxBuffer: 64 << 20 });
  if (done.error) throw done.error;
  if (done.status !== 0)
    throw new Error(`${tool} ${args.join(' ')}: ${done.signal ?? done.status}\n${done.stderr}${done.stdout}`);
  return done.stdout;
}

/** In the folder of the image, since QEMU looks for a data file with a relative name where it runs itself. */
export const qemuImg = (image: string, args: readonly string[]): string => run('qemu-img', args, dirname(image));

/** Each command on the one open image, in turn; data that qemu-io reports as an error throws. */
export function qemuIo(image: string, commands: readonly string[], options: readonly string[] = []): void {
  const said = run('qemu-io', [...options, ...commands.flatMap((command) => ['-c', command]), image], dirname(image));
  if (/failed|error/i.test(said)) throw new Error(`qemu-io ${image}: ${said}`);
}

/** Commands on an image whose process then dies at once: nothing is closed, the dirty bit stays. */
export function qemuIoKilled(image: string, commands: readonly string[]): void {
  const all = [...commands, 'sigraise 9'].flatMap((command) => ['-c', command]);
  const { signal, stderr } = spawnSync('qemu-io', [...all, image], { cwd: dirname(image), encoding: 'utf8' });
  if (signal !== 'SIGKILL')
    throw new Error(`qemu-io on ${image} was to die by SIGKILL, it ended by ${signal}: ${stderr}`);
}

/** One entry of `qemu-img info --output=json`, "snapshots". */
export interface QemuSnapshot {
  readonly id: string;
  /** Bytes that are not UTF-8 are shown as U+FFFD. */
  readonly name: string;
  readonly 'vm-state-size': number;
}

export interface QemuInfo {
  readonly 'virtual-size': number;
  readonly snapshots?: readonly QemuSnapshot[];
}

export const imageInfo = (image: string): QemuInfo =>
  JSON.parse(qemuImg(image, ['info', '-U', '--output=json', image])) as QemuInfo;

export const snapshotsOf = (image: string): readonly QemuSnapshot[] => imageInfo(image).snapshots ?? [];

/** What `qemu-img check` finds; nothing, if the image is as it should be. */
export function checkFindings(image: string): string {
  const done = spawnSync('qemu-img', ['check', '-f', 'qcow2', image], { cwd: dirname(image), encoding: 'utf8' });
  return done.status === 0 ? '' : `exit status ${done.status ?? done.signal}\n${done.stdout}${done.stderr}`;
}

/** The qcow2 images below an image, the nearest first. */
export const backingFiles = (image: string): string[] =>
  (
    JSON.parse(qemuImg(image, ['info', '--output=json', '--backing-chain', '-f', 'qcow2', image])) as {
      readonly filename: string;
      readonly format: string;
    }[]
  )
    .slice(1)
    .filter(({ format }) => format === 'qcow2')
    .map(({ filename }) => filename);

/** The bytes of a raw file, as a model. */
export function modelOfRaw(path: string): SparseModel {
  const model = new SparseModel(statSync(path).size);
  loadRaw(path, model, 0);
  return model;
}

function loadRaw(path: string, into: SparseModel, offset: number): void {
  const fd = openSync(path, 'r');
  try {
    const chunk = Buffer.alloc(READ_BYTES);
    for (let position = 0; ; ) {
      const count = readSync(fd, chunk, 0, chunk.length, position);
      if (count === 0) return;
      into.write(offset + position, chunk.subarray(0, count));
      position += count;
    }
  } finally {
    closeSync(fd);
  }
}

/** Run `use` with the path of a scratch file, which is gone afterwards. */
function withScratchFile<T>(use: (path: string) => T): T {
  const dir = mkdtempSync(join(tmpdir(), 'vdskfs-corpus-'));
  try {
    return use(join(dir, 'scratch'));
  } finally {
    rmSync(dir, { recursive: true });
  }
}

/** The whole disk, through `qemu-img convert`. For disks that fit into memory and into a host file. */
export const convertedDisk = (image: string): SparseModel =>
  withScratchFile((raw) => {
    qemuImg(image, ['convert', '-f', 'qcow2', '-O', 'raw', image, raw]);
    return modelOfRaw(raw);
  });

/** A snapshot through `qemu-img convert -l`. Its size is the live disk's: QEMU shows no snapshot's own size there. */
export const convertedSnapshot = (image: string, id: string): SparseModel =>
  withScratchFile((raw) => {
    qemuImg(image, ['convert', '-f', 'qcow2', '-O', 'raw', '-l', `snapshot.id=${id}`, image, raw]);
    return modelOfRaw(raw);
  });

interface MapEntry {
  readonly start: number;
  readonly length: number;
  readonly data: boolean;
}

/** A disk too large for a host file: only what `qemu-img map` calls data is read; the rest reads as zeros. */
export function mappedDisk(image: string): SparseModel {
  const entries = JSON.parse(qemuImg(image, ['map', '--output=json', '-f', 'qcow2', image])) as MapEntry[];
  const model = new SparseModel(imageInfo(image)['virtual-size']);
  for (const { start, length, data } of entries) {
    if (!data) continue;
    withScratchFile((raw) => {
      // A raw layer above the qcow2 one picks the range.
      const range = [
        'driver=raw',
        `offset=${start}`,
        `size=${length}`,
        'file.driver=qcow2',
        `file.file.filename=${image}`,
      ];
      qemuImg(image, ['convert', '--image-opts', '-O', 'raw', range.join(','), raw]);
      loadRaw(raw, model, start);
    });
  }
  return model;
}

/**
 * A snapshot with its own size: applied to a copy of the image (beside it, so that relative names still lead to the
 * backing file), which is then read as a disk.
 */
export function appliedSnapshot(image: string, id: string, read: (image: string) => SparseModel): SparseModel {
  const scratch = mkdtempSync(join(dirname(image), '.applied-'));
  const copy = `${scratch}.qcow2`;
  try {
    copySparse(image, copy);
    // -a takes an ID or a name, and an ID wins over a name.
    qemuImg(image, ['snapshot', '-a', id, copy]);
    return read(copy);
  } finally {
    rmSync(scratch, { recursive: true });
    rmSync(copy, { force: true });
  }
}

/** Copy a file with its holes. */
export function copySparse(from: string, to: string): void {
  const { status, stderr } = spawnSync('cp', ['--sparse=always', from, to], { encoding: 'utf8' });
  if (status !== 0) throw new Error(`cp ${from} ${to}: ${stderr}`);
}

/** sha256 of each file in the directory, by name. */
export function hashes(dir: string): Record<string, string> {
  const result: Record<string, string> = {};
  for (const name of readdirSync(dir).sort()) {
    const hash = createHash('sha256');
    const fd = openSync(join(dir, name), 'r');
    try {
      const chunk = Buffer.alloc(READ_BYTES);
      for (let count: number; (count = readSync(fd, chunk)) > 0; ) hash.update(chunk.subarray(0, count));
    } finally {
      closeSync(fd);
    }
    result[name] = hash.digest('hex');
  }
  return result;
}
