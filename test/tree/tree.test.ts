import { constants } from 'node:fs';
import { beforeEach, describe, expect, it } from 'vitest';
import { FsError } from '../../src/errors.ts';
import type { DirectoryNode, FileNode, Node, OpenFile } from '../../src/fuse/filesystem.ts';
import { createTree, type Tree } from '../../src/tree/tree.ts';
import { FakeDisk } from './fake-disk.ts';
import { putGpt, putMbr } from './partition-table/tables.ts';
import {
  at,
  caller,
  command,
  directoryAt,
  errnoOf,
  names,
  O_RDONLY,
  O_RDWR,
  O_TRUNC,
  O_WRONLY,
  open,
  text,
} from './walk.ts';

const MIB = 1 << 20;

let disk: FakeDisk;
let tree: Tree;
let root: DirectoryNode;

function mount(...disks: FakeDisk[]): void {
  disk = disks[0] as FakeDisk;
  tree = createTree(disks, { releaseGraceMs: 0 });
  root = tree.root;
}

/** Partitions 1 (sectors 64 to 127) and 2 (128 to 255). */
function partition(
  disk: FakeDisk,
  partitions: Record<number, readonly [number, number]> = { 0: [64, 127], 1: [128, 255] },
): void {
  const bytes = new Uint8Array(disk.live.bytes);
  putGpt(bytes, { partitions });
  disk.live.write(bytes, 0, bytes.length, 0);
}

beforeEach(() => mount(new FakeDisk({ bytes: MIB })));

const mkdir = async (path: string, name: string): Promise<Node> =>
  (await directoryAt(root, path)).makeDirectory(name, caller);
const rmdir = async (path: string, name: string): Promise<void> =>
  (await directoryAt(root, path)).removeDirectory(name, caller);
const put = async (path: string, offset: number, data: string): Promise<void> => {
  const file = await open(root, path, O_WRONLY);
  await file.write(offset, Buffer.from(data), false, caller);
  await file.release();
};
const get = async (path: string, offset: number, size: number): Promise<string> => {
  const file = await open(root, path);
  const bytes = Buffer.from(await file.read(offset, size, caller)).toString('latin1');
  await file.release();
  return bytes;
};

describe('the tree', () => {
  it('has a README and a directory per disk', async () => {
    mount(new FakeDisk({ name: 'vm1' }), new FakeDisk({ name: 'vm2' }));
    expect((await root.list()).map(({ name }) => name)).toEqual(['README', 'vm1', 'vm2']);
    expect(await names(root, 'vm2')).toEqual([
      'disk.raw',
      'partitions',
      'snapshots',
      'overlays',
      'control',
      'info.json',
    ]);
    expect((await root.attributes()).nlink).toBe(4);
    expect(root.ino).toBe(1);
    expect(root.parentIno).toBe(1);
  });

  it('has a README that says what it is, with five things to try', async () => {
    const readme = await text(root, 'README');
    for (const n of [1, 2, 3, 4, 5]) expect(readme).toContain(`\n  ${n}. `);
    expect(readme).toContain('mkdir vm1/snapshots/before-upgrade');
    expect((await (await at(root, 'README')).attributes()).size).toBe(Buffer.byteLength(readme));
  });

  it('refuses two disks of one name, and a disk named README, and holds none open then', () => {
    const twins = [new FakeDisk({ name: 'vm1' }), new FakeDisk({ name: 'vm1' })];
    expect(() => mount(...twins)).toThrow(/"vm1" is taken/);
    expect(() => mount(new FakeDisk({ name: 'README' }))).toThrow(/"README" is taken/);
    expect(twins.map(({ opened }) => opened)).toEqual([0, 0]);
  });

  it('lets go of the disks when it is closed', () => {
    expect(disk.opened).toBe(1);
    tree.close();
    expect(disk.opened).toBe(0);
  });

  it('gives the same node for the same thing, and each its own number', async () => {
    partition(disk);
    await mkdir('vm1/snapshots', 'a');
    const seen = new Map<number, string>();
    const walk = async (directory: DirectoryNode, path: string): Promise<void> => {
      for (const { name, node } of await directory.list()) {
        expect(await directory.lookup(name)).toBe(node);
        expect(seen.get(node.ino)).toBe(undefined);
        seen.set(node.ino, `${path}/${name}`);
        if (node.kind === 'directory') {
          expect(node.parentIno).toBe(directory.ino);
          await walk(node, `${path}/${name}`);
        }
      }
    };
    await walk(root, '');
    expect([...seen.values()]).toContain('/vm1/snapshots/a/partitions/2.raw');
    expect([...seen.values()]).toContain('/vm1/partitions/2.raw');
  });

  it('tells the space of the host file system, in blocks of 4096', async () => {
    const status = await tree.status();
    expect(status.blockBytes).toBe(4096);
    expect(status.totalBytes).toBeGreaterThanOrEqual(status.freeBytes);
  });

  it.each([
    ['', 0o555],
    ['vm1', 0o555],
    ['vm1/partitions', 0o555],
    ['vm1/snapshots', 0o755],
    ['vm1/overlays', 0o755],
    ['vm1/snapshots/a', 0o555],
    ['vm1/snapshots/a/partitions', 0o555],
    ['README', 0o444],
    ['vm1/disk.raw', 0o644],
    ['vm1/partitions/1.raw', 0o644],
    ['vm1/control', 0o644],
    ['vm1/info.json', 0o444],
    ['vm1/snapshots/a/disk.raw', 0o444],
    ['vm1/snapshots/a/partitions/1.raw', 0o444],
    ['vm1/snapshots/a/info.json', 0o444],
  ])('shows %s with mode %o, owned by whoever mounted', async (path, mode) => {
    partition(disk);
    await mkdir('vm1/snapshots', 'a');
    const node = path === '' ? root : await at(root, path);
    const attributes = await node.attributes();
    expect(attributes.mode & 0o7777).toBe(mode);
    expect(attributes.mode & constants.S_IFMT).toBe(node.kind === 'directory' ? constants.S_IFDIR : constants.S_IFREG);
    expect([attributes.uid, attributes.gid]).toEqual([process.getuid?.(), process.getgid?.()]);
  });

  it('shows a read-only disk without any permission to write', async () => {
    mount(new FakeDisk({ readOnly: 'asked for' }));
    expect((await (await at(root, 'vm1/disk.raw')).attributes()).mode & 0o222).toBe(0);
    expect((await (await at(root, 'vm1/snapshots')).attributes()).mode & 0o222).toBe(0);
  });

  it.each(['', 'vm1', 'vm1/partitions', 'vm1/snapshots/a', 'vm1/snapshots/a/partitions'])(
    'lets nothing be made, removed or moved in %j: EPERM',
    async (path) => {
      partition(disk);
      await mkdir('vm1/snapshots', 'a');
      const directory = path === '' ? root : await directoryAt(root, path);
      const [{ name } = { name: '' }] = await directory.list();
      const before = await directory.list();
      expect(await errnoOf(directory.makeDirectory('x', caller))).toBe('EPERM');
      expect(await errnoOf(directory.createFile('x', O_RDWR, 0o644, caller))).toBe('EPERM');
      expect(await errnoOf(directory.unlink(name, caller))).toBe('EPERM');
      expect(await errnoOf(directory.removeDirectory(name, caller))).toBe('EPERM');
      expect(await errnoOf(directory.rename(name, directory, 'x', false, caller))).toBe('EPERM');
      expect(await directory.list()).toEqual(before);
    },
  );

  it('lets no mode and no owner be changed: EPERM', async () => {
    for (const path of ['vm1', 'vm1/disk.raw', 'README', 'vm1/control', 'vm1/snapshots']) {
      const node = await at(root, path);
      expect(await errnoOf(node.setAttributes({ mode: 0o600 }, caller))).toBe('EPERM');
      expect(await errnoOf(node.setAttributes({ uid: 1 }, caller))).toBe('EPERM');
    }
  });

  it('has overlays/, empty; mkdir there asks the disk for an external checkpoint', async () => {
    expect(await names(root, 'vm1/overlays')).toEqual([]);
    expect(await errnoOf(mkdir('vm1/overlays', 'a'))).toBe('ENOTSUP');
    expect(await text(root, 'vm1/control')).toBe('no overlays\n');
  });
});

describe('disk.raw', () => {
  it('reads and writes the live contents, uncached', async () => {
    await put('vm1/disk.raw', 100, 'hello');
    expect(await get('vm1/disk.raw', 98, 9)).toBe('\0\0hello\0\0');
    expect((await open(root, 'vm1/disk.raw')).caching).toBe('direct');
  });

  it('has the size, the time and the allocated bytes of the image', async () => {
    await put('vm1/disk.raw', 100, 'hello');
    const attributes = await (await at(root, 'vm1/disk.raw')).attributes();
    expect(attributes).toMatchObject({ size: MIB, allocatedBytes: 4096, nlink: 1, mtimeMs: disk.modifiedMs() });
  });

  it('has its own slot for each open file, given back at release', async () => {
    const first = await open(root, 'vm1/disk.raw');
    const second = await open(root, 'vm1/disk.raw', O_RDWR);
    expect(first.slot).not.toBe(second.slot);
    await first.release();
    expect((await open(root, 'vm1/disk.raw')).slot).toBe(first.slot);
  });

  it('grows by truncate, shrinks not: EPERM', async () => {
    const file = await at(root, 'vm1/disk.raw');
    await file.setAttributes({ size: 2 * MIB }, caller);
    expect(disk.live.bytes).toBe(2 * MIB);
    expect((await file.attributes()).size).toBe(2 * MIB);
    expect(await errnoOf(file.setAttributes({ size: MIB }, caller))).toBe('EPERM');
    expect(await errnoOf(open(root, 'vm1/disk.raw', O_WRONLY | O_TRUNC))).toBe('EPERM');
    await file.setAttributes({ size: 2 * MIB }, caller);
    expect(disk.live.bytes).toBe(2 * MIB);
    expect(await text(root, 'vm1/control')).toMatch(/conv=notrunc/);
  });

  it('takes times without effect', async () => {
    const file = await at(root, 'vm1/disk.raw');
    await file.setAttributes({ times: true }, caller);
    expect((await file.attributes()).mtimeMs).toBe(disk.modifiedMs());
  });

  it('is not opened for writing on a read-only disk: EROFS, and the reason', async () => {
    mount(new FakeDisk({ readOnly: 'the image file is read-only' }));
    expect(await errnoOf(open(root, 'vm1/disk.raw', O_RDWR))).toBe('EROFS');
    expect(await text(root, 'vm1/control')).toBe(
      'disk.raw cannot be opened for writing: the image file is read-only.\n',
    );
    expect(await errnoOf((await at(root, 'vm1/disk.raw')).setAttributes({ size: 0 }, caller))).toBe('EROFS');
    expect(await errnoOf((await at(root, 'vm1/disk.raw')).setAttributes({ times: true }, caller))).toBe('EROFS');
  });

  it('waits with a write until the gate is open again', async () => {
    const file = await open(root, 'vm1/disk.raw', O_RDWR);
    disk.gateClosed = true;
    const writing = file.write(0, Buffer.from('late'), true, caller);
    expect(Buffer.from(await file.read(0, 4, caller)).toString()).toBe('\0\0\0\0');
    disk.openGate();
    expect(await writing).toBe(4);
    expect(disk.live.flushes).toBe(1);
    expect(await get('vm1/disk.raw', 0, 4)).toBe('late');
  });

  it('seeks, punches and syncs', async () => {
    const file = await open(root, 'vm1/disk.raw', O_RDWR);
    await file.write(4096, new Uint8Array(8192).fill(1), false, caller);
    expect(await file.seek(0, 3)).toBe(4096);
    expect(await file.seek(4096, 4)).toBe(12_288);
    await file.allocate(4096, 4096, 3);
    expect(await file.seek(0, 3)).toBe(8192);
    await file.sync();
    await file.flush();
    expect(disk.live.flushes).toBe(1);
    expect(await errnoOf(file.allocate(0, 1, 0x20))).toBe('ENOTSUP');
  });

  it('has failures told by control', async () => {
    const file = await open(root, 'vm1/disk.raw', O_RDWR);
    disk.live.failure = new FsError('ENOSPC', 'the host file system is full');
    expect(await errnoOf(file.write(0, Buffer.from('x'), false, caller))).toBe('ENOSPC');
    expect(await text(root, 'vm1/control')).toBe('the host file system is full\n');
  });
});

describe('partitions/', () => {
  it('has one file per partition, a view of the same bytes', async () => {
    partition(disk);
    expect(await names(root, 'vm1/partitions')).toEqual(['1.raw', '2.raw']);
    expect((await (await at(root, 'vm1/partitions/2.raw')).attributes()).size).toBe(128 * 512);
    await put('vm1/partitions/2.raw', 3, 'two');
    expect(await get('vm1/disk.raw', 128 * 512 + 3, 3)).toBe('two');
    await put('vm1/disk.raw', 64 * 512, 'one');
    expect(await get('vm1/partitions/1.raw', 0, 3)).toBe('one');
    expect(await get('vm1/partitions/1.raw', 64 * 512, 10)).toBe('');
  });

  it('follows the table: what stayed keeps its node, what moved gets another', async () => {
    partition(disk);
    const [one, two] = [await at(root, 'vm1/partitions/1.raw'), await at(root, 'vm1/partitions/2.raw')];
    const old = await (two as FileNode).open(O_RDONLY, caller);
    partition(disk, { 0: [64, 127], 1: [200, 255], 4: [300, 309] });
    await put('vm1/disk.raw', 128 * 512, 'old place');
    expect(await names(root, 'vm1/partitions')).toEqual(['1.raw', '2.raw', '5.raw']);
    expect(await at(root, 'vm1/partitions/1.raw')).toBe(one);
    expect((await at(root, 'vm1/partitions/2.raw')).ino).not.toBe(two.ino);
    expect(Buffer.from(await old.read(0, 9, caller)).toString()).toBe('old place');
    disk.live.write(new Uint8Array(512), 0, 512, 0);
    expect(await names(root, 'vm1/partitions')).toEqual([]);
    expect(await errnoOf(at(root, 'vm1/partitions/1.raw'))).toBe('ENOENT');
  });

  it('reads an MBR as well', async () => {
    const sector = new Uint8Array(512);
    putMbr(sector, 0, [undefined, { type: 0x83, start: 8, sectors: 8 }]);
    disk.live.write(sector, 0, 512, 0);
    expect(await names(root, 'vm1/partitions')).toEqual(['2.raw']);
  });

  it('has files that never change their size: EPERM', async () => {
    partition(disk);
    const file = await at(root, 'vm1/partitions/1.raw');
    for (const size of [0, 1, MIB]) expect(await errnoOf(file.setAttributes({ size }, caller))).toBe('EPERM');
    await file.setAttributes({ size: 64 * 512 }, caller);
  });

  it('claims no more allocated bytes than the disk has, and fewer than its size where the disk has holes', async () => {
    partition(disk);
    disk.live.discard(128 * 512, MIB / 2);
    const sizes = await Promise.all(
      ['1', '2'].map(async (n) => (await at(root, `vm1/partitions/${n}.raw`)).attributes()),
    );
    for (const { size, allocatedBytes } of sizes) expect(allocatedBytes).toBeLessThan(size);
    expect(sizes.reduce((sum, { allocatedBytes }) => sum + allocatedBytes, 0)).toBeLessThanOrEqual(
      disk.allocatedBytes(),
    );
  });
});

describe('writers that overlap', () => {
  beforeEach(() => partition(disk));

  it.each([
    ['vm1/disk.raw', 'vm1/partitions/1.raw', 'EBUSY'],
    ['vm1/partitions/2.raw', 'vm1/disk.raw', 'EBUSY'],
    ['vm1/partitions/1.raw', 'vm1/partitions/2.raw', 'no error'],
    ['vm1/disk.raw', 'vm1/disk.raw', 'no error'],
  ])('%s, then %s: %s', async (first, second, errno) => {
    const file = await open(root, first, O_RDWR);
    expect(await errnoOf(open(root, second, O_RDWR))).toBe(errno);
    expect(await errnoOf(open(root, second, O_RDONLY))).toBe('no error');
    await file.release();
    expect(await errnoOf(open(root, second, O_RDWR))).toBe('no error');
  });

  it('are told who is in the way', async () => {
    await open(root, 'vm1/partitions/1.raw', O_RDWR);
    await errnoOf(open(root, 'vm1/disk.raw', O_RDWR));
    expect(await text(root, 'vm1/control')).toMatch(/partitions\/1\.raw is open for writing/);
  });
});

describe('snapshots/', () => {
  it('mkdir takes a checkpoint, which keeps its contents', async () => {
    await put('vm1/disk.raw', 0, 'before');
    const made = await mkdir('vm1/snapshots', 'a');
    await put('vm1/disk.raw', 0, 'after!');
    expect(await at(root, 'vm1/snapshots/a')).toBe(made);
    expect(await get('vm1/snapshots/a/disk.raw', 0, 6)).toBe('before');
    expect(await get('vm1/disk.raw', 0, 6)).toBe('after!');
    expect(await names(root, 'vm1/snapshots/a')).toEqual(['disk.raw', 'partitions', 'info.json']);
  });

  it('shows each checkpoint at its time, files included, and counts them as links', async () => {
    await mkdir('vm1/snapshots', 'a');
    await mkdir('vm1/snapshots', 'b');
    expect((await (await at(root, 'vm1/snapshots')).attributes()).nlink).toBe(4);
    const [{ createdMs } = { createdMs: 0 }] = disk.checkpoints();
    for (const path of ['a', 'a/disk.raw', 'a/info.json', 'a/partitions']) {
      expect(await (await at(root, `vm1/snapshots/${path}`)).attributes()).toMatchObject({
        mtimeMs: createdMs,
        ctimeMs: createdMs,
        nlink: { a: 3, 'a/partitions': 2 }[path] ?? 1,
      });
    }
  });

  it('lists and stats checkpoints without opening them', async () => {
    await mkdir('vm1/snapshots', 'a');
    for (const { node } of await (await directoryAt(root, 'vm1/snapshots')).list()) await node.attributes();
    await (await at(root, 'vm1/snapshots/a/disk.raw')).attributes();
    expect(disk.opened).toBe(1);
  });

  it.each([
    ['a', 'EEXIST'],
    ['', 'EINVAL'],
    ['..', 'EINVAL'],
    ['a/b', 'EINVAL'],
    ['x'.repeat(256), 'ENAMETOOLONG'],
    ['x'.repeat(255), 'no error'],
    ['line\nbreak', 'no error'],
  ])('mkdir and mv to %j: %s', async (name, errno) => {
    await mkdir('vm1/snapshots', 'a');
    await mkdir('vm1/snapshots', 'b');
    const directory = await directoryAt(root, 'vm1/snapshots');
    expect(await errnoOf(directory.makeDirectory(name, caller))).toBe(errno);
    if (errno === 'no error') await directory.removeDirectory(name, caller);
    expect(await errnoOf(directory.rename('b', directory, name, false, caller))).toBe(errno);
  });

  it('rmdir deletes it, although it is not empty', async () => {
    await mkdir('vm1/snapshots', 'a');
    const inside = await at(root, 'vm1/snapshots/a');
    const file = await at(root, 'vm1/snapshots/a/disk.raw');
    await rmdir('vm1/snapshots', 'a');
    expect(await names(root, 'vm1/snapshots')).toEqual([]);
    expect(await errnoOf(rmdir('vm1/snapshots', 'a'))).toBe('ENOENT');
    expect(await errnoOf((inside as DirectoryNode).list())).toBe('ENOENT');
    expect(await errnoOf(file.attributes())).toBe('ENOENT');
    expect(await errnoOf((file as FileNode).open(O_RDONLY, caller))).toBe('ENOENT');
  });

  it('gives the next checkpoint a new node, also under the same name and ID', async () => {
    const first = await mkdir('vm1/snapshots', 'a');
    const [{ id } = { id: '' }] = disk.checkpoints();
    await rmdir('vm1/snapshots', 'a');
    const second = await mkdir('vm1/snapshots', 'a');
    expect(disk.checkpoints()[0]?.id).toBe(id);
    expect(second.ino).not.toBe(first.ino);
  });

  it.each(['disk.raw', 'info.json', 'partitions/1.raw'])('keeps a checkpoint whose %s is open: EBUSY', async (name) => {
    partition(disk);
    await mkdir('vm1/snapshots', 'a');
    const file = await open(root, `vm1/snapshots/a/${name}`);
    expect(await errnoOf(rmdir('vm1/snapshots', 'a'))).toBe('EBUSY');
    expect(await text(root, 'vm1/control')).toContain(`snapshots/a/${name} is open`);
    await file.release();
    await rmdir('vm1/snapshots', 'a');
    expect(disk.opened).toBe(1);
  });

  it('mv renames it: same node, same open files', async () => {
    await put('vm1/disk.raw', 0, 'data');
    const node = await mkdir('vm1/snapshots', 'a');
    const file = await open(root, 'vm1/snapshots/a/disk.raw');
    const directory = await directoryAt(root, 'vm1/snapshots');
    await directory.rename('a', directory, 'b', false, caller);
    expect(await names(root, 'vm1/snapshots')).toEqual(['b']);
    expect(await at(root, 'vm1/snapshots/b')).toBe(node);
    expect(Buffer.from(await file.read(0, 4, caller)).toString()).toBe('data');
    expect(await errnoOf(rmdir('vm1/snapshots', 'b'))).toBe('EBUSY');
    expect(JSON.parse(await text(root, 'vm1/snapshots/b/info.json'))).toMatchObject({ name: 'b' });
    await directory.rename('b', directory, 'b', false, caller);
  });

  it('mv goes nowhere else: EPERM', async () => {
    const inside = (await mkdir('vm1/snapshots', 'a')) as DirectoryNode;
    await mkdir('vm1/snapshots', 'b');
    const directory = await directoryAt(root, 'vm1/snapshots');
    expect(await errnoOf(directory.rename('b', inside, 'b', false, caller))).toBe('EPERM');
    expect(await errnoOf(directory.rename('b', root, 'b', false, caller))).toBe('EPERM');
    expect(await errnoOf(directory.rename('c', directory, 'd', false, caller))).toBe('ENOENT');
    expect(await errnoOf(directory.createFile('f', O_RDWR, 0o644, caller))).toBe('EPERM');
    expect(await errnoOf(directory.unlink('a', caller))).toBe('EPERM');
  });

  it('shows what others made under names that are none', async () => {
    disk.addForeign('a/b');
    disk.addForeign('twin');
    disk.addForeign('twin');
    disk.addForeign('');
    expect(await names(root, 'vm1/snapshots')).toEqual(['a∕b~1', 'twin~2', 'twin~3', '~4']);
    expect(JSON.parse(await text(root, 'vm1/snapshots/a∕b~1/info.json')).realName).toBe('a/b');
    expect(await errnoOf(mkdir('vm1/snapshots', 'twin'))).toBe('EEXIST');
    await rmdir('vm1/snapshots', 'twin~2');
    expect(await names(root, 'vm1/snapshots')).toEqual(['a∕b~1', 'twin', '~4']);
  });

  it('keeps the node of a twin that gets its own name back', async () => {
    disk.addForeign('twin');
    disk.addForeign('twin');
    const second = await at(root, 'vm1/snapshots/twin~2');
    await rmdir('vm1/snapshots', 'twin~1');
    expect(await at(root, 'vm1/snapshots/twin')).toBe(second);
  });

  it('has files that no one writes, kept in the cache of the kernel', async () => {
    await mkdir('vm1/snapshots', 'a');
    const file = await at(root, 'vm1/snapshots/a/disk.raw');
    expect(await errnoOf((file as FileNode).open(O_RDWR, caller))).toBe('EROFS');
    expect(await errnoOf(file.setAttributes({ size: 0 }, caller))).toBe('EROFS');
    expect(await errnoOf(file.setAttributes({ times: true }, caller))).toBe('EROFS');
    expect((await open(root, 'vm1/snapshots/a/disk.raw')).caching).toBe('keep');
    expect([file.attributesValidMs, file.entryValidMs]).toEqual([3_600_000, 3_600_000]);
    expect((await at(root, 'vm1/snapshots/a')).entryValidMs).toBe(0);
  });

  it('has the partitions of that moment', async () => {
    partition(disk);
    await put('vm1/partitions/1.raw', 0, 'then');
    await mkdir('vm1/snapshots', 'a');
    partition(disk, { 8: [300, 400] });
    expect(await names(root, 'vm1/snapshots/a/partitions')).toEqual(['1.raw', '2.raw']);
    expect(await get('vm1/snapshots/a/partitions/1.raw', 0, 4)).toBe('then');
    expect(disk.opened).toBe(1);
  });

  it('has the memory of a guest as `state`', async () => {
    disk.addForeign('running', { state: { state: Buffer.from('memory') } });
    expect(await names(root, 'vm1/snapshots/running')).toEqual(['disk.raw', 'partitions', 'info.json', 'state']);
    const state = await at(root, 'vm1/snapshots/running/state');
    expect(await state.attributes()).toMatchObject({ size: 6, allocatedBytes: 6 });
    expect(await get('vm1/snapshots/running/state', 3, 10)).toBe('ory');
  });

  it('takes, deletes and renames nothing on a read-only disk: EROFS', async () => {
    const readOnly = new FakeDisk({ readOnly: 'asked for' });
    readOnly.addForeign('a');
    mount(readOnly);
    const directory = await directoryAt(root, 'vm1/snapshots');
    expect(await errnoOf(directory.makeDirectory('b', caller))).toBe('EROFS');
    expect(await errnoOf(directory.removeDirectory('a', caller))).toBe('EROFS');
    expect(await errnoOf(directory.rename('a', directory, 'b', false, caller))).toBe('EROFS');
  });
});

describe('info.json', () => {
  it('of a disk has the fields that are promised', async () => {
    disk.addForeign('a', { state: { state: Buffer.from('memory') } });
    const content = await text(root, 'vm1/info.json');
    expect(content.endsWith('}\n')).toBe(true);
    expect(JSON.parse(content)).toEqual({
      name: 'vm1',
      image: '/tmp/vm1.qcow2',
      owner: 'served',
      readOnly: null,
      virtualSize: MIB,
      allocatedSize: 0,
      format: { version: 3, clusterSize: 65536, refcountBits: 16, features: [] },
      chain: [{ file: '/tmp/vm1.qcow2', format: 'qcow2', virtualSize: MIB }],
      guest: { kind: 'none', name: null, alive: false },
      operation: null,
      snapshots: [{ name: 'a', id: '1', created: '2024-01-01T00:00:00.000Z', vmStateSize: 6 }],
      overlays: [],
    });
  });

  it('of a checkpoint has the fields that are promised', async () => {
    disk.addForeign('x/y');
    expect(JSON.parse(await text(root, 'vm1/snapshots/x∕y~1/info.json'))).toEqual({
      name: 'x∕y~1',
      realName: 'x/y',
      id: '1',
      created: '2024-01-01T00:00:00.000Z',
      virtualSize: MIB,
      vmStateSize: 0,
      layer: 'vm1.qcow2',
      consistency: 'crash',
    });
  });

  it('of a checkpoint with memory names the guest too', async () => {
    disk.addForeign('m', { state: { state: Buffer.from('memory') } });
    expect(JSON.parse(await text(root, 'vm1/snapshots/m/info.json'))).toMatchObject({
      consistency: 'memory',
      guest: { kind: 'unknown', name: null },
    });
  });

  it('has its right size in stat, is read in pieces, and not written', async () => {
    const whole = await text(root, 'vm1/info.json');
    const node = await at(root, 'vm1/info.json');
    expect((await node.attributes()).size).toBe(Buffer.byteLength(whole));
    const file: OpenFile = await open(root, 'vm1/info.json');
    disk.addForeign('a');
    expect(Buffer.from(await file.read(2, 5, caller)).toString()).toBe(whole.slice(2, 7));
    expect(await file.read(1 << 20, 5, caller)).toHaveLength(0);
    expect(await file.seek(3, 3)).toBe(3);
    expect(await file.seek(3, 4)).toBe(whole.length);
    expect(await errnoOf(file.write(0, new Uint8Array(1), false, caller))).toBe('EROFS');
    expect(await errnoOf(open(root, 'vm1/info.json', O_RDWR))).toBe('EROFS');
  });
});

describe('the caches of the kernel', () => {
  it('are told of what changed behind them', async () => {
    partition(disk);
    await mkdir('vm1/snapshots', 'a');
    const inos = async (...paths: string[]) =>
      Promise.all(paths.map(async (path) => (await at(root, `vm1/${path}`)).ino));
    const live = await inos('disk.raw', 'partitions/1.raw', 'partitions/2.raw', 'info.json');
    const stale: number[] = [];
    tree.attachNotifier({ invalidateNode: (ino) => stale.push(ino), invalidateEntry: () => {} });
    await command(root, 'vm1', 'rollback a');
    expect(stale.splice(0)).toEqual(live);
    await (await at(root, 'vm1/disk.raw')).setAttributes({ size: 2 * MIB }, caller);
    expect(stale.splice(0)).toEqual(live);
    disk.addForeign('b');
    expect(stale).toEqual(await inos('snapshots', 'overlays', 'info.json'));
  });
});
