import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { FsError } from '../../src/errors.ts';
import type { Caller, DirectoryNode, OpenFile } from '../../src/fuse/filesystem.ts';
import type { Guest } from '../../src/guest/guest.ts';
import { createTree } from '../../src/tree/tree.ts';
import { FakeDisk } from './fake-disk.ts';
import { FakeGuest, type Step, steps } from './fake-guest.ts';
import { at, caller, command, directoryAt, errnoOf, names, O_RDWR, open, text } from './walk.ts';

const TIMEOUT_MS = 120_000;

let disks: FakeDisk[];
let guest: FakeGuest;
let root: DirectoryNode;
let found: Guest | undefined;

function mount(...names: string[]): void {
  disks = names.map((name) => new FakeDisk({ name }));
  guest = new FakeGuest();
  found = guest;
  const machine = {
    disks: names,
    find: async () => found,
    remembered: async () => guest,
    timeoutMs: TIMEOUT_MS,
    mountpoint: '/mnt',
  };
  root = createTree(disks, { releaseGraceMs: 0, machines: [machine] }).root;
  guest.root = root;
}

beforeEach(() => mount('vm1'));
afterEach(() => vi.useRealTimers());

const mkdir = async (name: string, disk = 'vm1', by: Caller = caller): Promise<unknown> =>
  (await directoryAt(root, `${disk}/snapshots`)).makeDirectory(name, by);
const taken = (disk = 'vm1'): Promise<string[]> => names(root, `${disk}/snapshots`);
const run = (line: string, disk = 'vm1'): Promise<void> => command(root, disk, line);
const answer = (disk = 'vm1'): Promise<string> => text(root, `${disk}/control`);
const write = (file: OpenFile, line: string) => file.write(0, Buffer.from(line), false, caller);
const incoming = (): Promise<string[]> => names(root, 'vm1/.incoming');

/** Nothing of the checkpoint is left, and the disk serves. */
async function expectNoTrace(): Promise<void> {
  for (const disk of disks) {
    expect(disk.checkpoints()).toEqual([]);
    expect(disk.pending).toBe(0);
    expect(disk.opened).toBe(1);
    const file = await open(root, `${disk.name}/disk.raw`, O_RDWR);
    expect(await write(file, 'still there')).toBe(11);
    await file.release();
  }
  expect(await incoming()).toEqual([]);
}

describe('a checkpoint of a running guest', () => {
  it('holds the disk of the first write to the memory, and the state', async () => {
    const file = await open(root, 'vm1/disk.raw', O_RDWR);
    await write(file, 'before');
    guest.on.set('paused', async () => void (await write(file, 'paused')));
    guest.on.set('memory', async () => void (await write(file, 'behind')));
    await mkdir('a');
    expect((await text(root, 'vm1/snapshots/a/disk.raw')).slice(0, 6)).toBe('paused');
    expect((await text(root, 'vm1/disk.raw')).slice(0, 6)).toBe('behind');
    expect(await text(root, 'vm1/snapshots/a/state')).toBe(guest.memory);
    expect(await text(root, 'vm1/snapshots/a/state.kern')).toBe('devices');
    expect(await text(root, 'vm1/snapshots/a/state.meta')).toBe('{}');
    expect(guest.log).toEqual([...steps, 'state.kern 7 function', 'state 28 function', 'state.meta 2 function']);
    expect(JSON.parse(await text(root, 'vm1/snapshots/a/info.json'))).toMatchObject({
      consistency: 'memory',
      guest: { kind: 'bhyve', name: 'vm1', version: '14.1', hostRelease: '1401000', argv: ['bhyve', 'vm1'] },
    });
    expect(guest.disposed).toBe(1);
  });

  it('keeps what was written to the other files before the guest stood still', async () => {
    guest.on.set('opened', async () => {
      const kern = await open(root, 'vm1/.incoming/1/state.kern', O_RDWR);
      await kern.write(0, Buffer.from('0123456789'), false, caller);
      await (await at(root, 'vm1/.incoming/1/state.kern')).setAttributes({ size: 8 }, caller);
      await kern.release();
      expect(disks[0]?.pending).toBe(0);
    });
    await mkdir('a');
    expect(await text(root, 'vm1/snapshots/a/state.kern')).toBe('devices7');
  });

  it('is taken without memory when the guest is off, and when that is wished', async () => {
    await run('checkpoint a --no-memory');
    guest.alive = false;
    await mkdir('b');
    found = undefined;
    await mkdir('c');
    expect(guest.log).toEqual([]);
    expect(await taken()).toEqual(['a', 'b', 'c']);
    expect(JSON.parse(await text(root, 'vm1/snapshots/a/info.json')).consistency).toBe('crash');
  });

  it('lets the file systems stand still around a checkpoint without memory', async () => {
    guest.agent = [];
    await run('checkpoint a --no-memory');
    expect(guest.agent).toEqual(['freeze', 'thaw']);
    expect(JSON.parse(await text(root, 'vm1/snapshots/a/info.json')).consistency).toBe('frozen');
  });

  it('fails with EEXIST before the guest is asked', async () => {
    disks[0]?.addForeign('a');
    expect(await errnoOf(mkdir('a'))).toBe('EEXIST');
    expect(await errnoOf(mkdir('x/y'))).toBe('EINVAL');
    expect(guest.log).toEqual([]);
  });

  it('tells in status what runs, and who', async () => {
    await run('status');
    expect(await answer()).toMatch(/guest: vm1\nkind: bhyve\nalive: yes\nstate: running\noperation: idle\n/);
    guest.on.set('memory', async () => {
      await run('status');
      expect(await answer()).toMatch(/state: paused\noperation: checkpoint a \d+%\n/);
    });
    await mkdir('a');
    guest.alive = false;
    await run('status');
    expect(await answer()).toMatch(/alive: no\nstate: off\n/);
    expect(JSON.parse(await text(root, 'vm1/info.json')).guest).toEqual({ kind: 'bhyve', name: 'vm1', alive: false });
  });

  it('ends a suspended guest', async () => {
    await run('suspend a');
    expect(await answer()).toMatch(/"a" taken, ID 1; the guest has ended/);
    expect(guest.alive).toBe(false);
    expect(await errnoOf(run('suspend b'))).toBe('ENOTCONN');
    await expect(taken()).resolves.toEqual(['a']);
  });

  describe('of a guest that waits before it ends', () => {
    beforeEach(() => {
      guest.waits = true;
    });

    it('is there when the guest ends', async () => {
      guest.on.set('ended', async () => expect(await taken()).toEqual(['a']));
      await run('suspend a');
      expect(guest.log.at(-1)).toBe('ended');
    });

    it('lets the guest run on where it cannot be kept', async () => {
      const [disk] = disks as [FakeDisk];
      const freeze = disk.freeze.bind(disk);
      disk.freeze = async (...args) => {
        const pending = await freeze(...args);
        const publish = async () => {
          await pending.abandon();
          throw new FsError('ENOSPC', 'the host disk is full');
        };
        return { ...pending, createState: (file) => pending.createState(file), publish };
      };
      expect(await errnoOf(run('suspend a'))).toBe('ENOSPC');
      expect(guest).toMatchObject({ alive: true, state: 'running' });
      expect(guest.log).not.toContain('ended');
      await expectNoTrace();
    });

    it('stays when the guest does not end, and says so', async () => {
      guest.on.set('ended', () => {
        throw new FsError('ETIMEDOUT', 'QEMU did not end');
      });
      expect(await errnoOf(run('suspend a'))).toBe('EIO');
      expect(await answer()).toBe('"a" is taken, but guest vm1 did not end.\n');
      expect(await taken()).toEqual(['a']);
    });
  });

  it('lets no other change of its disks in between: the guest would stand still for it', async () => {
    disks[0]?.addForeign('old');
    const folder = await directoryAt(root, 'vm1/snapshots');
    let removing: Promise<void> | undefined;
    guest.on.set('opened', async () => {
      removing = folder.removeDirectory('old', caller);
    });
    guest.on.set('paused', async () => expect(await taken()).toEqual(['old']));
    await mkdir('a');
    await removing;
    expect(await taken()).toEqual(['a']);
  });

  it('takes two that are wished at once one after the other', async () => {
    await Promise.all([mkdir('a'), run('checkpoint b')]);
    expect(await taken()).toEqual(['a', 'b']);
    expect(guest.log.filter((step) => step === 'asked')).toHaveLength(2);
  });
});

describe('a checkpoint that goes wrong', () => {
  const failure = new FsError('EIO', 'the device nvme cannot be saved');

  it.each(steps)('leaves no trace when the guest breaks off after it has %s', async (step: Step) => {
    guest.on.set(step, () => {
      throw failure;
    });
    expect(await errnoOf(mkdir('a'))).toBe('EIO');
    expect(await answer()).toBe('the device nvme cannot be saved\n');
    await expectNoTrace();
  });

  it.each(steps)('leaves no trace when the guest hangs after it has %s', async (step: Step) => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    guest.on.set(step, () => new Promise(() => {}));
    const result = errnoOf(mkdir('a'));
    await vi.advanceTimersByTimeAsync(TIMEOUT_MS - 1);
    expect(guest.log.at(-1)).toBe(step);
    await vi.advanceTimersByTimeAsync(5001);
    expect(await result).toBe('ETIMEDOUT');
    expect(await answer()).toMatch(/has not written its state within 120 s/);
    vi.useRealTimers();
    await expectNoTrace();
  });

  it.each(steps.slice(0, -1))('leaves no trace when mkdir is interrupted after the guest has %s', async (step) => {
    const interrupt = new AbortController();
    guest.on.set(step, (target) => {
      interrupt.abort(new FsError('EINTR', 'interrupted'));
      expect(target.signal.aborted).toBe(true);
      throw new FsError('EIO', 'gave up');
    });
    expect(await errnoOf(mkdir('a', 'vm1', { ...caller, signal: interrupt.signal }))).toBe('EINTR');
    await expectNoTrace();
  });

  it('is not given up by an interrupt when the guest was asked to end', async () => {
    const interrupt = new AbortController();
    guest.on.set('paused', () => interrupt.abort(new FsError('EINTR', 'interrupted')));
    const control = await open(root, 'vm1/control', O_RDWR);
    await control.write(0, Buffer.from('suspend a'), false, { ...caller, signal: interrupt.signal });
    expect(await taken()).toEqual(['a']);
  });

  it('leaves no trace when the state is nonsense', async () => {
    guest.invalid = new FsError('EIO', 'state.meta is no JSON');
    expect(await errnoOf(mkdir('a'))).toBe('EIO');
    expect(await answer()).toBe('state.meta is no JSON\n');
    await expectNoTrace();
  });

  it('tells the disk that cannot be frozen, not what the guest makes of it', async () => {
    const [disk] = disks as [FakeDisk];
    disk.freeze = async () => {
      throw new FsError('ENOSPC', 'the host disk is full');
    };
    guest.on.set('closed', () => {
      throw failure;
    });
    expect(await errnoOf(mkdir('a'))).toBe('ENOSPC');
    expect(await answer()).toBe('the host disk is full\n');
    await expectNoTrace();
  });

  it('lets the guest hear of a failed write only when its disk has the space back', async () => {
    const [disk] = disks as [FakeDisk];
    const order: string[] = [];
    const freeze = disk.freeze.bind(disk);
    disk.freeze = async (...args) => {
      const pending = await freeze(...args);
      return {
        ...pending,
        createState: (name) => {
          const kept = pending.createState(name);
          kept.contents.write = () => {
            throw new FsError('ENOSPC', 'the host disk is full');
          };
          return kept;
        },
        abandon: async () => {
          await pending.abandon();
          order.push('abandoned');
        },
      };
    };
    const save = guest.save.bind(guest);
    guest.save = async (target) => {
      await save(target).finally(() => order.push('the guest runs on'));
    };
    expect(await errnoOf(mkdir('a'))).toBe('ENOSPC');
    expect(order).toEqual(['abandoned', 'the guest runs on']);
    await expectNoTrace();
  });

  it('takes no more state once it is over', async () => {
    let late: OpenFile | undefined;
    guest.on.set('memory', async () => {
      late = await open(root, 'vm1/.incoming/1/state', O_RDWR);
      throw failure;
    });
    expect(await errnoOf(mkdir('a'))).toBe('EIO');
    expect(await errnoOf(write(late as OpenFile, 'more'))).toBe('EIO');
    await late?.release();
    await expectNoTrace();
  });

  it('fails when the guest says that it is done and has written nothing', async () => {
    guest.memory = '';
    guest.save = async () => {};
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    const result = errnoOf(mkdir('a'));
    await vi.advanceTimersByTimeAsync(10_000);
    expect(await result).toBe('EIO');
    expect(await answer()).toMatch(/wrote no memory/);
    vi.useRealTimers();
    await expectNoTrace();
  });
});

describe('a guest with two disks', () => {
  beforeEach(() => mount('vm1', 'data'));

  it('is checkpointed as a whole, its memory kept where it was asked', async () => {
    await mkdir('a', 'data');
    expect([await taken(), await taken('data')]).toEqual([['a'], ['a']]);
    expect(await names(root, 'data/snapshots/a')).toContain('state');
    expect(await names(root, 'vm1/snapshots/a')).not.toContain('state');
    expect(await errnoOf(mkdir('a', 'vm1'))).toBe('EEXIST');
    await (await directoryAt(root, 'vm1/snapshots')).removeDirectory('a', caller);
    expect(await taken('data')).toEqual(['a']);
    guest.log.length = 0;
    expect(await errnoOf(mkdir('a', 'vm1'))).toBe('EEXIST');
    expect(guest.log).toEqual([]);
    guest.alive = false;
    await mkdir('b');
    expect([await taken(), await taken('data')]).toEqual([['b'], ['a', 'b']]);
  });

  it('is restored with all its disks, wherever its memory is', async () => {
    await mkdir('a', 'data');
    expect(await errnoOf(run('restore a'))).toBe('EBUSY');
    guest.alive = false;
    for (const disk of ['vm1', 'data']) {
      const file = await open(root, `${disk}/disk.raw`, O_RDWR);
      await write(file, 'behind');
      expect(await errnoOf(run('restore a'))).toBe('EBUSY');
      await file.release();
    }
    await run('restore a');
    expect(await answer()).toBe('/mnt/data/snapshots/a/state\n');
    for (const disk of ['vm1', 'data']) expect((await text(root, `${disk}/disk.raw`)).charCodeAt(0)).toBe(0);
    await run('restore-command a');
    expect(await answer()).toMatch(/^bhyve -r \/mnt\/data\/snapshots\/a\/state /);
    await (await directoryAt(root, 'vm1/snapshots')).removeDirectory('a', caller);
    expect(await errnoOf(run('restore a', 'data'))).toBe('ENOENT');
  });

  it('has it on both disks or on none', async () => {
    const [, second] = disks as [FakeDisk, FakeDisk];
    const freeze = second.freeze.bind(second);
    second.freeze = async (...args) => ({
      ...(await freeze(...args)),
      publish: async () => {
        second.pending--;
        throw new FsError('ENOSPC', 'full');
      },
    });
    expect(await errnoOf(mkdir('a', 'vm1'))).toBe('ENOSPC');
    await expectNoTrace();
    expect(await errnoOf(mkdir('a', 'data'))).toBe('ENOSPC');
    await expectNoTrace();
    second.freeze = async () => {
      throw new FsError('ENOSPC', 'full');
    };
    guest.alive = false;
    expect(await errnoOf(mkdir('a', 'vm1'))).toBe('ENOSPC');
    await expectNoTrace();
  });

  it('has its writes held on all disks between the first and the last', async () => {
    const held: boolean[][] = [];
    for (const disk of disks) {
      const freeze = disk.freeze.bind(disk);
      disk.freeze = (...args) => {
        held.push(disks.map(({ gateClosed }) => gateClosed));
        return freeze(...args);
      };
    }
    await mkdir('a');
    await run('checkpoint b --no-memory');
    expect(held).toEqual(Array.from({ length: 4 }, () => [true, true]));
    expect(disks.map(({ gateClosed }) => gateClosed)).toEqual([false, false]);
  });
});

describe('a guest that holds its images itself', () => {
  const hold = (...names: string[]) => {
    mount(...names);
    for (const disk of disks) {
      disk.owner = 'attached';
      disk.readOnly = 'its guest has it open';
    }
  };
  beforeEach(() => hold('vm1'));

  it('takes and deletes its checkpoints, and is asked for nothing else', async () => {
    await mkdir('a');
    expect(guest.log).toEqual([]);
    expect(await taken()).toEqual(['a']);
    expect(await errnoOf(mkdir('a'))).toBe('EEXIST');
    await (await directoryAt(root, 'vm1/snapshots')).removeDirectory('a', caller);
    expect(await taken()).toEqual([]);
    expect(await errnoOf(run('suspend b'))).toBe('ENOTSUP');
    expect(await errnoOf(run('resize 4194304'))).toBe('EROFS');
    expect(await errnoOf(open(root, 'vm1/disk.raw', O_RDWR))).toBe('EROFS');
    expect((await (await at(root, 'vm1/snapshots')).attributes()).mode & 0o777).toBe(0o755);
    expect(JSON.parse(await text(root, 'vm1/info.json'))).toMatchObject({ owner: 'attached', live: 'inconsistent' });
    await run('status');
    expect(await answer()).toContain('owner: attached\n');
  });

  it('stands still while it takes those of several disks, if it takes them one by one', async () => {
    hold('vm1', 'data');
    const log: string[] = [];
    Object.defineProperty(guest, 'kind', { value: 'qemu' });
    guest.pause = async () => String(log.push('pause'));
    guest.resume = async () => String(log.push('resume'));
    for (const disk of disks) {
      const take = disk.takeCheckpoint.bind(disk);
      disk.takeCheckpoint = (...args) => {
        log.push(disk.name);
        return take(...args);
      };
    }
    await mkdir('a', 'data');
    expect(log).toEqual(['pause', 'vm1', 'data', 'resume']);
    expect([await taken(), await taken('data')]).toEqual([['a'], ['a']]);
    const [, second] = disks as [FakeDisk, FakeDisk];
    second.takeCheckpoint = async () => {
      throw new FsError('ENOSPC', 'full');
    };
    expect(await errnoOf(mkdir('b', 'data'))).toBe('ENOSPC');
    expect([await taken(), await taken('data')]).toEqual([['a'], ['a']]);
    expect(log.at(-1)).toBe('resume');
  });
});

describe('.incoming', () => {
  it('is hidden, and takes nothing but state', async () => {
    expect(await names(root, 'vm1')).not.toContain('.incoming');
    guest.on.set('opened', async () => {
      const folder = await directoryAt(root, 'vm1/.incoming/1');
      expect((await folder.list()).map(({ name }) => name)).toEqual(['state.kern', 'state', 'state.meta']);
      expect((await (await folder.lookup('state')).attributes()).mode & 0o777).toBe(0o700);
      expect(await errnoOf(folder.createFile('other', O_RDWR, 0o600, caller))).toBe('EPERM');
      expect(await errnoOf(folder.makeDirectory('other', caller))).toBe('EPERM');
      expect(await errnoOf(folder.unlink('state', caller))).toBe('EPERM');
    });
    await mkdir('a');
    expect(guest.log).toContain('closed');
    expect(await errnoOf(at(root, 'vm1/.incoming/1'))).toBe('ENOENT');
  });
});

describe('.by-id', () => {
  it('has every checkpoint under a short name', async () => {
    await mkdir('a name that is much too long for bhyve');
    expect(await names(root, 'vm1')).not.toContain('.by-id');
    expect(await text(root, 'vm1/.by-id/1/state')).toBe(guest.memory);
    await (await directoryAt(root, 'vm1/snapshots')).removeDirectory('a name that is much too long for bhyve', caller);
    expect(await errnoOf(at(root, 'vm1/.by-id/1'))).toBe('ENOENT');
  });
});

describe('commands for a guest', () => {
  it('go to it', async () => {
    await run('stats');
    expect(await answer()).toBe('exits: 7\n');
    await run('guest --get-stats  now');
    expect(await answer()).toBe('heard --get-stats  now\n');
    await run('pause');
    expect(await answer()).toBe('guest vm1: pause done\n');
    expect(await errnoOf(run('nmi'))).toBe('ENOTSUP');
    expect(await answer()).toBe('This bhyve knows no NMI.\n');
    expect(await errnoOf(run('guest'))).toBe('EINVAL');
    expect(guest.disposed).toBe(5);
  });

  it('prints the command that restores, running or not', async () => {
    await mkdir("it's mine");
    await run("restore-command it's mine");
    const state = "'/mnt/vm1/snapshots/it'\\''s mine/state'";
    expect(await answer()).toBe(`bhyve -r ${state} -s 3,virtio-blk,/mnt/vm1/disk.raw vm1\n`);
    found = undefined;
    await run("restore-command it's mine");
    expect(await answer()).toMatch(/^bhyve -r /);
    await run('checkpoint plain');
    expect(await errnoOf(run('restore-command plain'))).toBe('ENOTSUP');
  });

  it('refuse to roll back under a running guest', async () => {
    await mkdir('a');
    expect(await errnoOf(run('rollback a'))).toBe('EBUSY');
    guest.alive = false;
    await run('rollback a');
  });
});
