/** A disk in a folder of its own, with what the tests of overlays do to it. */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Checkpoint, Contents, Disk } from '../../src/disk/disk.ts';
import { type OpenDiskOptions, openDisk } from '../../src/disk/open-disk.ts';
import { createImage } from '../../src/qcow2/create.ts';

export class OverlayDisk {
  readonly folder = mkdtempSync(join(tmpdir(), `vdskfs-overlays-${process.pid}-`));
  readonly image = this.at('vm1.qcow2');
  readonly bytes: number;
  readonly options: Partial<OpenDiskOptions>;
  #disk: Disk | undefined;

  constructor(bytes = 2 ** 20, clusterBytes = 4096, options: Partial<OpenDiskOptions> = {}) {
    this.bytes = bytes;
    this.options = options;
    createImage(this.image, { size: bytes, clusterBytes });
  }

  at(...names: string[]): string {
    return join(this.folder, ...names);
  }

  get disk(): Disk {
    if (this.#disk === undefined) throw new Error('the disk is not open');
    return this.#disk;
  }

  async open(path = this.image, options: Partial<OpenDiskOptions> = {}): Promise<Disk> {
    await this.close();
    this.#disk = await openDisk(path, { readOnly: false, ...this.options, ...options });
    return this.#disk;
  }

  async close(): Promise<void> {
    const disk = this.#disk;
    this.#disk = undefined;
    await disk?.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      await this.close();
    } finally {
      rmSync(this.folder, { recursive: true });
    }
  }

  write(fill: number, offset: number, length: number): void {
    using live = this.disk.openLive();
    if (!live.contents.write(new Uint8Array(length).fill(fill), 0, length, offset))
      throw new Error('the gate is closed');
  }

  /** A digest: comparing megabytes byte by byte takes a test longer than all else. */
  live(): string {
    using live = this.disk.openLive();
    return digest(bytesOf(live.contents));
  }

  /** Of kind 'external' if there are two. */
  checkpoint(name: string): Checkpoint {
    const found = this.disk.checkpoints().filter((one) => one.name === name);
    const checkpoint = found.find(({ kind }) => kind === 'external') ?? found[0];
    if (checkpoint === undefined) throw new Error(`no checkpoint ${name}`);
    return checkpoint;
  }

  contents(name: string): string {
    using open = this.disk.openCheckpoint(this.checkpoint(name));
    return digest(bytesOf(open.contents));
  }

  take(name: string): Promise<Checkpoint> {
    return this.disk.takeCheckpoint(name, { kind: 'external' });
  }

  /** Names of the external checkpoints. */
  get overlays(): string[] {
    return this.disk
      .checkpoints()
      .filter(({ kind }) => kind === 'external')
      .map(({ name }) => name);
  }

  get files(): string[] {
    return readdirSync(this.folder).sort();
  }

  get chain(): string[] {
    return this.disk.info().chain.map(({ file }) => file.slice(this.folder.length + 1));
  }
}

export function bytesOf(contents: Contents): Buffer {
  const bytes = Buffer.alloc(contents.size());
  contents.read(bytes, 0, bytes.length, 0);
  return bytes;
}

export const digest = (bytes: Uint8Array): string => createHash('sha1').update(bytes).digest('hex');

/** Digest of a disk as QEMU reads it. */
export function qemuDigest(path: string): string {
  const raw = `${path}.as-raw`;
  execFileSync('qemu-img', ['convert', '-U', '-O', 'raw', path, raw]);
  const bytes = readFileSync(raw);
  rmSync(raw);
  return digest(bytes);
}

export const qemuCheck = (path: string): void => {
  execFileSync('qemu-img', ['check', '-q', '-U', path], { stdio: 'pipe' });
};
