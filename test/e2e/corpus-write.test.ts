/**
 * Each image of the corpus written through a mount by a random script, against a model in memory; then QEMU reads it
 * and checks it. VDSKFS_SEED repeats a failed run, VDSKFS_STEPS makes it longer or shorter.
 */
import { type FileHandle, mkdir, open, rename, rmdir, writeFile } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { describe, expect, it } from 'vitest';
import {
  autoclearBits,
  corpus,
  corpusOf,
  headerCluster,
  referenceDisk,
  referenceSnapshot,
  snapshotExtraData,
  type Variant,
} from './corpus.ts';
import { expectContents, expectFile, expectRange, listCheckpoints } from './corpus-compare.ts';
import type { SparseModel } from './corpus-model.ts';
import { checkFindings, hashes, modelOfRaw, snapshotsOf } from './corpus-qemu.ts';
import { Random } from './corpus-random.ts';
import { driver, type MountedTree, withMount } from './mount.ts';
import { runOk, withDirectory } from './run.ts';

const STEPS = Number(process.env.VDSKFS_STEPS ?? 60);
const SEED = Number(process.env.VDSKFS_SEED ?? 20_240_607);
/** fuse-native passes fallocate(2) on to nobody. */
const CAN_ALLOCATE = driver === 'native';
const KiB = 1024;
const MiB = 1024 * KiB;

describe.each(corpusOf(driver))('$name: $what', (variant) => {
  it('holds what a random script wrote, in the mount and for QEMU, and qemu-img check finds nothing', () =>
    withDirectory(async (directory) => {
      const image = variant.make(directory);
      const others = othersIn(directory, image, variant);
      const script = await Script.load(variant, image);
      try {
        await withMount(image, {}, (tree) => script.run(tree));
        script.expectImage();
        expect(othersIn(directory, image, variant)).toEqual(others);
      } catch (error) {
        if (error instanceof Error) error.message += `\nVDSKFS_SEED=${SEED}, steps:\n${script.log.join('\n')}`;
        throw error;
      }
    }));
});

/** Hashes of the files that no write to the image may change: its backing files. */
function othersIn(directory: string, image: string, variant: Variant): Record<string, string> {
  const { [basename(image)]: _image, 'disk.data': _data, ...others } = hashes(directory);
  // The server leaves nothing beside the image; a data file that is the image's own may change.
  expect(
    Object.keys(others).every((name) => /^(base|level\d+|middle)\.(raw|qcow2)$/.test(name)),
    variant.name,
  ).toBe(true);
  return others;
}

interface ModelCheckpoint {
  readonly id: string;
  readonly model: SparseModel;
}

/** The script, and what it believes. */
class Script {
  readonly log: string[] = [];
  readonly #variant: Variant;
  readonly #image: string;
  readonly #random: Random;
  #live: SparseModel;
  /** By ID until the mount says which directory shows which, then by the name of the directory. */
  #checkpoints: Map<string, ModelCheckpoint>;
  #taken = 0;
  #grown = 0;
  #named = 0;

  private constructor(variant: Variant, image: string, live: SparseModel, checkpoints: Map<string, ModelCheckpoint>) {
    this.#variant = variant;
    this.#image = image;
    // One seed for all: which variant it is makes the scripts differ.
    this.#random = new Random(SEED + corpus.indexOf(variant));
    this.#live = live;
    this.#checkpoints = checkpoints;
  }

  static async load(variant: Variant, image: string): Promise<Script> {
    const checkpoints = snapshotsOf(image).map(
      ({ id }) => [id, { id, model: referenceSnapshot(variant, image, id) }] as const,
    );
    return new Script(variant, image, referenceDisk(variant, image), new Map(checkpoints));
  }

  async run(tree: MountedTree): Promise<void> {
    const disk = tree.path(basename(this.#image, '.qcow2'));
    const shown = await listCheckpoints(join(disk, 'snapshots'));
    // Those of the layers below are not this disk's to change.
    const own = [...shown].filter(([, { layer }]) => layer === basename(this.#image));
    this.#checkpoints = new Map(own.map(([name, { id }]) => [name, this.#byId(id)]));
    for (let left = STEPS; left > 0; ) {
      // The file stays open from one rollback to the next: rolling back is refused while somebody may write.
      const file = await open(join(disk, 'disk.raw'), 'r+');
      try {
        for (let again = true; left > 0 && again; left--) again = await this.#step(disk, file);
        await expectContents(file, this.#live, 'disk.raw', this.#variant.sparse);
      } finally {
        await file.close();
      }
      if (left > 0) await this.#rollback(disk);
    }
    for (const [name, { model }] of this.#checkpoints) {
      await expectFile(join(disk, 'snapshots', name, 'disk.raw'), model, this.#variant.sparse);
    }
  }

  /** After the unmount: what QEMU says. */
  expectImage(): void {
    expect(checkFindings(this.#image)).toBe('');
    this.#expectEqual(referenceDisk(this.#variant, this.#image), this.#live, 'the disk');
    const ids = snapshotsOf(this.#image).map(({ id }) => id);
    expect(ids.sort()).toEqual([...this.#checkpoints.values()].map(({ id }) => id).sort());
    for (const [name, { id, model }] of this.#checkpoints) {
      const ownSize = model.size !== this.#live.size;
      this.#expectEqual(referenceSnapshot(this.#variant, this.#image, id, ownSize), model, `snapshot ${name}`);
    }
    if (this.#variant.rawDataFile !== undefined) {
      const raw = modelOfRaw(join(dirname(this.#image), this.#variant.rawDataFile));
      raw.resize(this.#live.size); // QEMU makes the file end with a cluster
      this.#expectEqual(raw, this.#live, 'the raw data file');
    }
  }

  #expectEqual(found: SparseModel, wanted: SparseModel, what: string): void {
    const at = found.firstDifference(wanted);
    if (at === undefined) return;
    const bytes = (from: SparseModel) => from.read(at, 16).toString('hex');
    throw new Error(
      `QEMU reads ${what} (${found.size} bytes) otherwise at byte ${at}: ${bytes(found)}, not ${bytes(wanted)} (${wanted.size})`,
    );
  }

  #byId(id: string): ModelCheckpoint {
    for (const checkpoint of this.#checkpoints.values()) if (checkpoint.id === id) return checkpoint;
    throw new Error(`the tree shows a checkpoint with ID ${id}, which qemu-img does not list`);
  }

  /** @returns false when a rollback is due */
  async #step(disk: string, file: FileHandle): Promise<boolean> {
    const choice = this.#random.below(100);
    if (choice < 42) await this.#write(file);
    else if (choice < 50) await this.#allocate(join(disk, 'disk.raw'), 'punch');
    else if (choice < 58) await this.#allocate(join(disk, 'disk.raw'), 'zero');
    else if (choice < 72) await this.#read(file);
    else if (choice < 76) await this.#sync(file);
    else if (choice < 83) await this.#take(disk);
    else if (choice < 87) await this.#delete(disk);
    else if (choice < 90) await this.#rename(disk);
    else if (choice < 94) await this.#readCheckpoint(disk);
    else if (choice < 95) await this.#grow(file);
    else if (choice < 97) await expectContents(file, this.#live, 'disk.raw', this.#variant.sparse);
    else return false;
    return true;
  }

  /** A range inside the disk: mostly any byte, often near what is there, at times the end; undefined on an empty disk. */
  #range(longest: number): { offset: number; length: number } | undefined {
    const size = this.#live.size;
    if (size === 0) return undefined;
    const unit = this.#random.pick([1, 1, 512, 4 * KiB, 64 * KiB]);
    const near = this.#random.below(size);
    const length = Math.min(Math.max(Math.floor((1 + this.#random.below(longest)) / unit), 1) * unit, size);
    const start = this.#variant.sparse ? this.#nearData() : this.#random.below(20) === 0 ? size - length : near;
    const offset = Math.min(Math.floor(start / unit) * unit, size - length);
    return { offset, length };
  }

  /** In a huge disk a random offset meets nothing: go where something is, most of the time. */
  #nearData(): number {
    const ranges = this.#live.dataRanges();
    if (ranges.length === 0 || this.#random.below(4) === 0) return this.#random.below(this.#live.size);
    return Math.max(this.#random.pick(ranges).start - 4 * KiB + this.#random.below(64 * KiB), 0);
  }

  async #write(file: FileHandle): Promise<void> {
    const range = this.#range(this.#random.pick([700, 10 * KiB, 100 * KiB, MiB + 5]));
    if (!range) return;
    this.log.push(`write ${range.offset} ${range.length}`);
    const data = this.#random.below(8) === 0 ? Buffer.alloc(range.length) : this.#random.bytes(range.length);
    for (let done = 0; done < data.length; ) {
      done += (await file.write(data, done, data.length - done, range.offset + done)).bytesWritten;
    }
    this.#live.write(range.offset, data);
  }

  async #allocate(path: string, mode: 'punch' | 'zero'): Promise<void> {
    const range = this.#range(this.#random.pick([5000, 200 * KiB, 5 * MiB]));
    if (!CAN_ALLOCATE || !range) return;
    this.log.push(`${mode} ${range.offset} ${range.length}`);
    const option = mode === 'punch' ? '--punch-hole' : '--zero-range';
    await runOk('fallocate', [option, '--offset', String(range.offset), '--length', String(range.length), path]);
    this.#live.zero(range.offset, range.length);
  }

  async #read(file: FileHandle): Promise<void> {
    const range = this.#range(2 * MiB);
    if (!range) return;
    this.log.push(`read ${range.offset} ${range.length}`);
    await expectRange(file, this.#live, range.offset, range.length, 'disk.raw');
  }

  async #sync(file: FileHandle): Promise<void> {
    this.log.push('fsync');
    await file.sync();
  }

  async #take(disk: string): Promise<void> {
    const name = `taken-${this.#named++}`;
    const path = join(disk, 'snapshots', name);
    if (this.#variant.checkpoints === 0) {
      this.log.push(`mkdir ${name}, which the format cannot hold`);
      await expect(mkdir(path)).rejects.toMatchObject({ code: 'ENOTSUP' });
      return;
    }
    if (this.#taken >= this.#variant.checkpoints) return;
    this.log.push(`mkdir ${name}`);
    await mkdir(path);
    this.#taken++;
    const id = (await listCheckpoints(join(disk, 'snapshots'))).get(name)?.id;
    if (id === undefined) throw new Error(`${path} is not listed after mkdir`);
    this.#checkpoints.set(name, { id, model: this.#live.clone() });
  }

  #pickCheckpoint(): readonly [string, ModelCheckpoint] | undefined {
    const all = [...this.#checkpoints];
    return all.length === 0 ? undefined : this.#random.pick(all);
  }

  async #delete(disk: string): Promise<void> {
    const picked = this.#pickCheckpoint();
    if (!picked) return;
    const [name] = picked;
    this.log.push(`rmdir ${name}`);
    await rmdir(join(disk, 'snapshots', name));
    this.#checkpoints.delete(name);
    if (name.startsWith('taken') || name.startsWith('renamed')) this.#taken--;
  }

  async #rename(disk: string): Promise<void> {
    const picked = this.#pickCheckpoint();
    if (!picked) return;
    const [name, checkpoint] = picked;
    const own = name.startsWith('taken') || name.startsWith('renamed');
    const newName = `${own ? 'renamed' : 'moved'}-${this.#named++}`;
    this.log.push(`mv ${name} ${newName}`);
    await rename(join(disk, 'snapshots', name), join(disk, 'snapshots', newName));
    this.#checkpoints.delete(name);
    this.#checkpoints.set(newName, checkpoint);
  }

  async #rollback(disk: string): Promise<void> {
    const picked = this.#pickCheckpoint();
    // A command is one line, a name its rest: one that holds a line's end cannot be said.
    if (!picked?.[0] || picked[0].includes('\n')) return;
    const [name, { model }] = picked;
    this.log.push(`rollback ${name}`);
    await writeFile(join(disk, 'control'), `rollback ${name}\n`, { flag: 'r+' });
    this.#live = model.clone();
  }

  async #readCheckpoint(disk: string): Promise<void> {
    const picked = this.#pickCheckpoint();
    if (!picked) return;
    const [name, { model }] = picked;
    this.log.push(`compare ${name}`);
    await expectFile(join(disk, 'snapshots', name, 'disk.raw'), model, this.#variant.sparse);
  }

  async #grow(file: FileHandle): Promise<void> {
    const { version, sparse, headerBytes, checkpoints } = this.#variant;
    // Version 2 keeps no disk size with a snapshot, and QEMU takes no odd size.
    if (sparse || headerBytes !== undefined || (version === 2 && this.#checkpoints.size > 0) || this.#grown === 2)
      return;
    // QEMU reads a snapshot of another size by applying it: one reference more, which refcounts this narrow cannot hold.
    if (checkpoints > 0 && checkpoints < 6) return;
    const size = this.#live.size + (1 + this.#random.below(4 * KiB)) * 512;
    this.log.push(`grow to ${size}`);
    await file.truncate(size);
    this.#live.resize(size);
    this.#grown++;
  }
}

/** Mount the variant of that name, write a byte, unmount; then look at the image. */
async function afterOneWrite(
  name: string,
  look: (image: string, before: string) => void,
  more = async (_disk: string): Promise<void> => {},
): Promise<void> {
  const variant = corpus.find((it) => it.name === name);
  if (!variant) throw new Error(`the corpus has no ${name}`);
  await withDirectory(async (directory) => {
    const copies = join(directory, 'before');
    await mkdir(copies);
    const before = variant.make(copies);
    const now = join(directory, 'now');
    await mkdir(now);
    const image = variant.make(now);
    await withMount(image, {}, async (tree) => {
      const disk = tree.path(basename(image, '.qcow2'));
      await writeFile(join(disk, 'disk.raw'), 'x', { flag: 'r+' });
      await more(disk);
    });
    look(image, before);
  });
}

describe('what the format asks of the first write', () => {
  it('an autoclear bit that nobody knows is cleared', () =>
    afterOneWrite('unknown-autoclear', (image) => expect(autoclearBits(image)).toBe(0n)));

  it.each(['unknown-extension', 'unknown-extension-backing'])('%s: the extension stays, byte by byte', (name) =>
    afterOneWrite(name, (image, before) => {
      const extension = (path: string): Buffer => {
        const bytes = headerCluster(path);
        const text = bytes.indexOf('keep me, byte by byte');
        return bytes.subarray(text - 8, text + 24);
      };
      expect(extension(image)).toEqual(extension(before));
    }),
  );

  it('extra data of snapshots stays when a checkpoint is taken and one renamed', () =>
    afterOneWrite(
      'snapshots-extra-data',
      (image, before) => {
        const now = snapshotExtraData(image);
        for (const [id, extra] of snapshotExtraData(before)) expect(now.get(id)).toEqual(extra);
      },
      async (disk) => {
        await mkdir(join(disk, 'snapshots', 'another'));
        await rename(join(disk, 'snapshots', 'one'), join(disk, 'snapshots', 'first'));
      },
    ));

  it('an image that is only mounted for writing keeps its bitmaps', () =>
    withDirectory(async (directory) => {
      const image = corpus.find(({ name }) => name === 'bitmaps')?.make(directory) ?? '';
      await withMount(image, {}, (tree) => open(tree.path('disk', 'disk.raw'), 'r').then((file) => file.close()));
      expect(autoclearBits(image) & 1n).toBe(1n);
      expect(checkFindings(image)).toBe('');
    }));
});
