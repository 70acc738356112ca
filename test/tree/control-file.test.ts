import { beforeEach, describe, expect, it } from 'vitest';
import type { DirectoryNode, OpenFile } from '../../src/fuse/filesystem.ts';
import { createTree } from '../../src/tree/tree.ts';
import { FakeDisk } from './fake-disk.ts';
import { at, caller, command, directoryAt, errnoOf, names, O_RDWR, open, text } from './walk.ts';

let disk: FakeDisk;
let root: DirectoryNode;

beforeEach(() => {
  disk = new FakeDisk();
  root = createTree([disk], { releaseGraceMs: 0 }).root;
});

const run = (line: string): Promise<void> => command(root, 'vm1', line);
const answer = (): Promise<string> => text(root, 'vm1/control');
const checkpoints = (): Promise<string[]> => names(root, 'vm1/snapshots');
const write = (file: OpenFile, offset: number, line: string) => file.write(offset, Buffer.from(line), false, caller);
const read = async (file: OpenFile, offset: number, size = 4096): Promise<string> =>
  Buffer.from(await file.read(offset, size, caller)).toString();

describe('control', () => {
  it('lists every command of the contract in its help', async () => {
    await run('help');
    const help = await answer();
    for (const name of [
      ...[
        'help',
        'status',
        'checkpoint NAME [--no-memory]',
        'del-checkpoint NAME',
        'ext-checkpoint NAME [--no-memory]',
      ],
      ...[
        'del-ext-checkpoint NAME [--discard]',
        'rename OLD NEW',
        'diff FROM [TO]',
        'space',
        'rollback NAME',
        'resize BYTES [--shrink]',
      ],
      ...[
        'suspend NAME',
        'restore-command NAME',
        'pause',
        'resume',
        'reset',
        'poweroff',
        'nmi',
        'stats',
        'guest WORDS…',
      ],
    ]) {
      expect(`\n${help}`).toContain(`\n${name}  `);
    }
  });

  it('says the status in lines `key: value`', async () => {
    await run('status');
    expect((await answer()).split('\n')).toEqual(
      expect.arrayContaining([
        'disk: vm1',
        'owner: served',
        'guest: none',
        'kind: none',
        'alive: no',
        'state: off',
        'operation: idle',
      ]),
    );
    await open(root, 'vm1/disk.raw', O_RDWR);
    await run('status');
    expect(await answer()).toContain('state: unknown\n');
  });

  it('takes, renames and deletes checkpoints', async () => {
    await run('checkpoint a --no-memory');
    expect(await answer()).toBe('checkpoint "a" taken, ID 1\n');
    await run('checkpoint before the upgrade');
    await run('rename "before the upgrade" b');
    expect(await checkpoints()).toEqual(['a', 'b']);
    await run('rename b "say \\"b\\""');
    await run('del-checkpoint a');
    expect(await checkpoints()).toEqual(['say "b"']);
    await run('del-checkpoint "say \\"b\\""');
    expect(await checkpoints()).toEqual([]);
  });

  it('tells what changed, and what each checkpoint takes, as JSON', async () => {
    disk.live.write(Buffer.from('old'), 0, 3, 0);
    await run('checkpoint a');
    disk.live.write(Buffer.from('new'), 0, 3, 8192);
    await run('checkpoint "b c"');
    await run('diff a');
    expect(JSON.parse(await answer())).toEqual([{ offset: 8192, length: 4096, kind: 'data' }]);
    await run('diff "b c" a');
    expect(JSON.parse(await answer())).toEqual([{ offset: 8192, length: 4096, kind: 'zero' }]);
    await run('diff "b c"');
    expect(JSON.parse(await answer())).toEqual([]);
    await run('space');
    expect(JSON.parse(await answer())).toEqual({
      checkpoints: ['a', 'b c'].map((name) => ({ name, kind: 'internal', own: 1, shared: 2, freed: 3 })),
      live: { own: 4, shared: 5 },
    });
    for (const [line, errno] of [
      ['diff', 'EINVAL'],
      ['diff a b c', 'EINVAL'],
      ['diff none', 'ENOENT'],
      ['space a', 'EINVAL'],
    ] as const) {
      expect(await errnoOf(run(line))).toBe(errno);
    }
  });

  it('takes the name shown first, else the first checkpoint of that real name', async () => {
    disk.addForeign('twin');
    disk.addForeign('twin');
    disk.addForeign('twin~1', { id: '7' });
    expect(await checkpoints()).toEqual(['twin~1~2', 'twin~2', 'twin~1']);
    await run('del-checkpoint twin~1');
    expect(disk.checkpoints().map(({ id }) => id)).toEqual(['1', '2']);
    await run('del-checkpoint twin');
    expect(disk.checkpoints().map(({ id }) => id)).toEqual(['2']);
  });

  it('rolls back, unless someone writes the disk', async () => {
    await run('checkpoint a');
    const file = await open(root, 'vm1/disk.raw', O_RDWR);
    await write(file, 0, 'changed');
    expect(await errnoOf(run('rollback a'))).toBe('EBUSY');
    expect(await answer()).toMatch(/disk\.raw is open for writing/);
    expect(await read(file, 0, 7)).toBe('changed');
    await file.release();
    await run('rollback a');
    expect(await read(await open(root, 'vm1/disk.raw'), 0, 7)).toBe('\0\0\0\0\0\0\0');
  });

  it('resizes, and shrinks only where that is said and no one writes', async () => {
    await run('resize 2097152');
    expect(await answer()).toBe('the disk has 2097152 bytes\n');
    expect(await errnoOf(run('resize 4096'))).toBe('EPERM');
    const file = await open(root, 'vm1/disk.raw', O_RDWR);
    expect(await errnoOf(run('resize 4096 --shrink'))).toBe('EBUSY');
    await run('resize 4194304');
    await file.release();
    await run('resize 4096 --shrink');
    expect((await (await at(root, 'vm1/disk.raw')).attributes()).size).toBe(4096);
  });

  it.each([
    ['', 'EINVAL'],
    ['frobnicate', 'EINVAL'],
    ['status now', 'EINVAL'],
    ['checkpoint', 'EINVAL'],
    ['checkpoint ""', 'EINVAL'],
    ['checkpoint a/b', 'EINVAL'],
    ['checkpoint "a', 'EINVAL'],
    ['rename a', 'EINVAL'],
    ['rename a b c', 'EINVAL'],
    ['resize', 'EINVAL'],
    ['resize 10G', 'EINVAL'],
    ['resize -1', 'EINVAL'],
    ['resize 99999999999999999999', 'EINVAL'],
    ['checkpoint there', 'EEXIST'],
    ['rename there there', 'no error'],
    ['del-checkpoint nowhere', 'ENOENT'],
    ['rename nowhere b', 'ENOENT'],
    ['rollback nowhere', 'ENOENT'],
    ['ext-checkpoint a', 'ENOTSUP'],
    ['del-ext-checkpoint a', 'ENOENT'],
    ['suspend a', 'ENOTSUP'],
    ['restore-command a', 'ENOENT'],
    ['restore-command there', 'ENOTSUP'],
    ['pause', 'ENOTSUP'],
    ['poweroff', 'ENOTSUP'],
    ['guest --get-stats', 'ENOTSUP'],
  ])('%j: %s, and a sentence to read', async (line, errno) => {
    disk.addForeign('there');
    expect(await errnoOf(run(line))).toBe(errno);
    expect(await answer()).toMatch(/^.{10,}\n$/);
  });

  it('says which commands there are when it knows one not', async () => {
    await errnoOf(run('frobnicate'));
    expect(await answer()).toMatch(/"frobnicate".*help, status, checkpoint, del-checkpoint/);
  });

  it('says that the disk has no guest', async () => {
    await errnoOf(run('pause'));
    expect(await answer()).toContain('the disk vm1 has no guest');
  });

  it('takes no bytes that are not UTF-8, and no command without end', async () => {
    const file = await open(root, 'vm1/control', O_RDWR);
    expect(await errnoOf(file.write(0, Uint8Array.of(0x68, 0xff), false, caller))).toBe('EINVAL');
    expect(await errnoOf(file.write(0, new Uint8Array(70_000).fill(0x61), false, caller))).toBe('EINVAL');
    expect(await read(file, 0)).toMatch(/at most 65536 bytes/);
  });

  it('may be truncated first, as a shell does', async () => {
    await (await at(root, 'vm1/control')).setAttributes({ size: 0 }, caller);
  });

  it('answers each open file for itself, and a fresh one for the last command', async () => {
    const [one, other] = [await open(root, 'vm1/control', O_RDWR), await open(root, 'vm1/control', O_RDWR)];
    await write(one, 0, 'checkpoint a');
    await write(other, 0, 'checkpoint b');
    expect(await read(one, 0)).toBe('checkpoint "a" taken, ID 1\n');
    expect(await read(other, 0)).toBe('checkpoint "b" taken, ID 2\n');
    expect(await answer()).toBe('checkpoint "b" taken, ID 2\n');
    expect((await (await at(root, 'vm1/control')).attributes()).size).toBe('checkpoint "b" taken, ID 2\n'.length);
  });

  it('is read from its start, or on from where the command ended on the same descriptor', async () => {
    const file = await open(root, 'vm1/control', O_RDWR);
    await write(file, 0, 'checkpoint a\n');
    expect(await read(file, 13, 11)).toBe('checkpoint ');
    expect(await read(file, 24)).toBe('"a" taken, ID 1\n');
    expect(await errnoOf(write(file, 40, 'nonsense\n'))).toBe('EINVAL');
    expect(await read(file, 40, 16)).toBe('There is no comm');
    await write(file, 0, 'checkpoint b\n');
    expect(await read(file, 0)).toBe('checkpoint "b" taken, ID 2\n');
  });

  it('tells why mkdir, rmdir and mv failed', async () => {
    const directory = await directoryAt(root, 'vm1/snapshots');
    await directory.makeDirectory('a', caller);
    expect(await answer()).toBe('checkpoint "a" taken, ID 1\n');
    await errnoOf(directory.makeDirectory('a', caller));
    expect(await answer()).toBe('vm1 has a checkpoint "a" already.\n');
    await errnoOf((await directoryAt(root, 'vm1')).makeDirectory('x', caller));
    expect(await answer()).toMatch(/"x" cannot be made in vm1: /);
  });

  it('tells the progress of a slow operation meanwhile', async () => {
    let finish = () => {};
    disk.hold = new Promise((resolve) => (finish = resolve));
    const taking = run('checkpoint slow');
    await run('status');
    expect(await answer()).toContain('operation: checkpoint 42%\n');
    finish();
    await taking;
    expect(await answer()).toBe('checkpoint "slow" taken, ID 1\n');
  });
});
