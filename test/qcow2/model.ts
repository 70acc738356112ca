/** An engine over memory, and the plain array that it must agree with. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { rebuildRefcounts } from '../../src/qcow2/check.ts';
import { type FormatOptions, formatImage } from '../../src/qcow2/create.ts';
import { readHeader } from '../../src/qcow2/header.ts';
import type { Backing, Image } from '../../src/qcow2/image.ts';
import { closeImage, openImage, snapshotList } from '../../src/qcow2/open-image.ts';
import { isMarked, unmark } from '../../src/qcow2/session-mark.ts';
import { readSnapshotTable } from '../../src/qcow2/snapshot-table.ts';
import type { SnapshotList } from '../../src/qcow2/snapshots.ts';
import type { Storage } from '../../src/storage/storage.ts';
import { MemoryStorage } from '../storage/memory-storage.ts';

export interface Session {
  readonly storage: Storage;
  readonly image: Image;
  readonly list: SnapshotList;
}

/** A formatted image in memory. */
export function formatted(options: FormatOptions, punches = true): MemoryStorage {
  const storage = new MemoryStorage({ punches });
  formatImage(storage, options);
  return storage;
}

/** Open for writing; with the smallest caches, if nothing else is said, so that slices come and go. */
export function openSession(storage: Storage, data: Storage = storage, backing?: Backing, cacheBytes = 0): Session {
  const header = readHeader(storage);
  const snapshots = readSnapshotTable(storage, header);
  const { image } = openImage({ file: storage, data, backing, header, snapshots, writable: true, cacheBytes });
  return { storage, image, list: snapshotList(header, snapshots) };
}

export function closeSession(session: Session): void {
  closeImage(session.image);
}

/** What `qemu-img check` says of the image; throws with its report unless it finds nothing at all. */
export function qemuCheck(storage: MemoryStorage): void {
  const folder = mkdtempSync(join(tmpdir(), 'vdskfs-check-'));
  try {
    const path = join(folder, 'image.qcow2');
    storage.save(path);
    // What the test images name as backing and data file.
    writeFileSync(join(folder, 'b'), '');
    writeFileSync(join(folder, 'd'), '');
    try {
      execFileSync('qemu-img', ['check', '-f', 'qcow2', path], { encoding: 'utf8', stdio: 'pipe', cwd: folder });
    } catch (error) {
      const { stdout, stderr } = error as { stdout: string; stderr: string };
      throw new Error(`qemu-img check: ${stdout}${stderr}`);
    }
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** As src/disk/open-chain.ts opens an image for writing that the last session left behind. */
export function recover(file: Storage): void {
  const header = readHeader(file);
  if (!isMarked(header)) return;
  rebuildRefcounts(file, header);
  unmark(file);
}

/** A backing file whose bytes are known; undefined: none. */
export type Pattern = (Backing & { readonly content: Uint8Array }) | undefined;

/** A backing file in memory with recognisable bytes. */
export function patternBacking(bytes: number, seed = 0x5b): NonNullable<Pattern> {
  const content = new Uint8Array(bytes).map((_, index) => (index * 31 + seed + Math.floor(index / 512)) & 0xff);
  return {
    content,
    size: () => bytes,
    read: (target, at, length, offset) => target.set(content.subarray(offset, offset + length), at),
    extentAt: (_offset, length) => ({ data: true, length }),
  };
}
