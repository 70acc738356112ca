/** Guests of bhyve, played by the stand-in, on disks that are really mounted. */
import { copyFile, mkdir, mkdtemp, open, readdir, readFile, rmdir, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import {
  type BhyveHost,
  compareState,
  type Fault,
  type Generation,
  type GuestOptions,
  type HostOptions,
  installBhyve,
  type RunningGuest,
  startGuest,
} from '../stand-in/bhyve.ts';
import { driver, launcher, type MountedTree, vdskfs, withMount } from './mount.ts';
import { run, runOk, withDirectory } from './run.ts';

const BLOCKS = 256;

interface Scene {
  readonly host: BhyveHost;
  readonly tree: MountedTree;
  /** Name of the VM; its disks are `disk` and, where there are two, `disk2`. */
  readonly vm: string;
  readonly disk: string;
  readonly disk2: string;
  readonly directory: string;
  /** Start the guest; it is ended with the scene. */
  boot(options?: Partial<GuestOptions>): Promise<RunningGuest>;
  checkpoint(name: string): string;
  /** Write a command to control. @throws with the sentence that control then has */
  control(command: string): Promise<string>;
}

interface SceneOptions extends HostOptions {
  readonly disks?: 1 | 2;
  readonly timeoutSeconds?: number;
  readonly args?: readonly string[];
}

let serial = 0;

/** A mounted image, a host with bhyve and a VM whose disk it is; afterwards the image must be in order. */
async function scene(options: SceneOptions, body: (scene: Scene) => Promise<void>): Promise<void> {
  await withDirectory(async (directory) => {
    const host = await installBhyve(directory, options);
    serial += 1;
    const vm = `e2e${process.pid}-${serial}`;
    const disks = ['disk', 'disk2'].slice(0, options.disks ?? 1);
    const images = disks.map((disk) => join(directory, `${disk}.qcow2`));
    for (const image of images) await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M']);
    const args = [
      ...disks.flatMap((disk) => ['--guest', `${disk}=bhyve:${vm}`]),
      ...(options.timeoutSeconds === undefined ? [] : ['--guest-timeout', String(options.timeoutSeconds)]),
      ...(options.args ?? []),
    ];
    const guests: RunningGuest[] = [];
    await withMount(images, { args, env: host.env }, async (tree) => {
      const paths = disks.map((disk) => tree.path(disk, 'disk.raw'));
      const control = tree.path('disk', 'control');
      try {
        await body({
          host,
          tree,
          vm,
          directory,
          disk: paths[0] as string,
          disk2: paths[1] as string,
          async boot(more = {}) {
            const guest = await startGuest(host, vm, { disks: paths, delayUs: 100, ...more });
            guests.push(guest);
            return guest;
          },
          checkpoint: (name) => tree.path('disk', 'snapshots', name),
          async control(command) {
            await writeFile(control, command).catch(async (error) => {
              throw new Error(`${error.code}: ${await readFile(control, 'utf8')}`);
            });
            return readFile(control, 'utf8');
          },
        });
      } finally {
        for (const guest of guests) {
          guest.kill();
          await guest.ended;
        }
      }
    });
    for (const image of images) await runOk('qemu-img', ['check', image]);
  });
}

const state = (checkpoint: string): string => join(checkpoint, 'state');

/** A state that can be mapped, as bhyve wants to. fuse-native mounts with direct I/O, where Linux maps no shared memory. */
async function mappable(checkpoint: string, directory: string): Promise<string> {
  if (driver === 'native') return state(checkpoint);
  const copy = await mkdtemp(join(directory, 'state-'));
  for (const name of ['state', 'state.kern', 'state.meta']) await copyFile(join(checkpoint, name), join(copy, name));
  return state(copy);
}

/** The checkpoint's memory compared with the checkpoint's disk. */
const compared = (host: BhyveHost, checkpoint: string): Promise<string> =>
  compareState(host, state(checkpoint), [join(checkpoint, 'disk.raw')]);

/** mkdir's errno, and the sentence that `control` has then. */
async function refusal({ tree, checkpoint }: Scene, name: string): Promise<string> {
  const code = await mkdir(checkpoint(name)).then(
    () => 'none',
    (error) => error.code,
  );
  return `${code}: ${await readFile(tree.path('disk', 'control'), 'utf8')}`;
}

/** No checkpoint is left, and what the guest does next is taken as if nothing had been. */
async function expectNoTrace({ tree, disk }: Scene): Promise<void> {
  expect(await readdir(tree.path('disk', 'snapshots'))).toEqual([]);
  expect(await readdir(tree.path('disk', '.incoming'))).toEqual([]);
  expect((await stat(disk)).size).toBe(64 * 2 ** 20);
}

/** Someone writes to the disk, and it takes it. */
async function expectChange(disk: string): Promise<void> {
  const start = async (): Promise<Buffer> => {
    await using file = await open(disk);
    return (await file.read(Buffer.alloc(1 << 20), 0, 1 << 20, 0)).buffer;
  };
  const before = await start();
  await expect.poll(async () => before.equals(await start()), { timeout: 10_000, interval: 10 }).toBe(false);
}

/** The guest goes on writing. */
async function expectToRun(guest: RunningGuest, { disk }: Scene): Promise<void> {
  await expectChange(disk);
  expect(await run('kill', ['-0', String(guest.pid)])).toMatchObject({ status: 0 });
}

describe('a checkpoint of a running guest', () => {
  it('holds memory, devices and disk of one instant, and is what `bhyve -r` wants', () =>
    scene({}, async ({ host, tree, boot, checkpoint, control, vm, disk, directory }) => {
      const guest = await boot();
      await mkdir(checkpoint('a b'));
      expect((await readdir(checkpoint('a b'))).sort()).toEqual([
        'disk.raw',
        'info.json',
        'partitions',
        'state',
        'state.kern',
        'state.meta',
      ]);
      expect((await stat(state(checkpoint('a b')))).size).toBe(1 << 20);
      const info = JSON.parse(await readFile(join(checkpoint('a b'), 'info.json'), 'utf8'));
      expect(info).toMatchObject({ consistency: 'memory', guest: { kind: 'bhyve', name: vm } });
      expect(await control('status')).toMatch(/kind: bhyve\nalive: yes\nstate: running\noperation: idle/);

      await expect(control('rollback a b')).rejects.toThrow(/EBUSY/);
      guest.kill();
      await guest.ended;
      expect(await control('status')).toMatch(/alive: no\nstate: off/);
      expect(await control('restore-command a b')).toContain(`-r '${state(checkpoint('a b'))}'`);
      await control('rollback a b');
      const restored = await boot({ args: ['-r', await mappable(checkpoint('a b'), directory)] });
      expect(restored.lines()[0]).toBe(`restored ${BLOCKS}`);
      await mkdir(checkpoint('later'));
      const later = await mappable(checkpoint('later'), directory);
      expect(await compareState(host, later, [join(checkpoint('later'), 'disk.raw')])).toBe(`restored ${BLOCKS}`);
      expect(tree.log()).not.toContain('Error');
      expect((await stat(disk)).blocks).toBeGreaterThan(0);
    }));
});

// What follows is the same whoever speaks to the kernel.
if (driver === 'native') {
  describe('under load', () => {
    it('each of 50 checkpoints restores exactly', () =>
      scene({}, async ({ host, boot, checkpoint, control }) => {
        let guest = await boot();
        const names = Array.from({ length: 50 }, (_, index) => `c${index}`);
        for (const name of names) await mkdir(checkpoint(name));
        for (const name of names) expect(await compared(host, checkpoint(name)), name).toBe(`restored ${BLOCKS}`);
        for (const name of ['c7', 'c49', 'c0']) {
          guest.kill();
          await guest.ended;
          await control(`rollback ${name}`);
          guest = await boot({ args: ['-r', state(checkpoint(name))] });
          expect(guest.lines()[0]).toBe(`restored ${BLOCKS}`);
        }
        for (const name of names.slice(0, 5)) await rmdir(checkpoint(name));
        expect(guest.lines()).not.toContain('empty connection');
      }));

    it('a guest that is not paused does not restore: what finds that is not blind', () =>
      scene({}, async ({ host, boot, checkpoint }) => {
        const guest = await boot();
        await guest.setFault('unpaused');
        await mkdir(checkpoint('torn'));
        expect(await compared(host, checkpoint('torn'))).toMatch(/^inconsistent \d+$/);
        await guest.setFault('fine');
        await mkdir(checkpoint('whole'));
        expect(await compared(host, checkpoint('whole'))).toBe(`restored ${BLOCKS}`);
      }));

    it('an external checkpoint has memory of the same instant too', () =>
      scene({}, async ({ host, tree, boot, control }) => {
        const guest = await boot();
        const overlay = (name: string): string => tree.path('disk', 'overlays', name);
        for (const name of ['one', 'two', 'three']) await mkdir(overlay(name));
        for (const name of ['one', 'two', 'three'])
          expect(await compared(host, overlay(name))).toBe(`restored ${BLOCKS}`);
        expect(await control('restore-command two')).toContain(`-r ${state(overlay('two'))}`);
        await guest.setFault('die 9');
        await expect(mkdir(overlay('four'))).rejects.toMatchObject({ code: 'EIO' });
        expect((await readdir(overlay(''))).sort()).toEqual(['one', 'three', 'two']);
      }));

    it('two disks are of one instant', () =>
      scene({ disks: 2 }, async ({ host, tree, boot }) => {
        await boot();
        for (const name of ['one', 'two', 'three']) {
          await mkdir(tree.path('disk2', 'snapshots', name));
          const disks = ['disk', 'disk2'].map((disk) => tree.path(disk, 'snapshots', name, 'disk.raw'));
          const memory = tree.path('disk2', 'snapshots', name, 'state');
          expect(await compareState(host, memory, disks)).toBe(`restored ${2 * BLOCKS}`);
          expect(await readdir(tree.path('disk', 'snapshots', name))).not.toContain('state');
        }
        await expect(mkdir(tree.path('disk', 'snapshots', 'two'))).rejects.toMatchObject({ code: 'EEXIST' });
      }));
  });

  describe.each<Generation>(['A', 'B', 'C', 'D', 'E'])('generation %s', (generation) => {
    it.each([false, true])('checkpoint, suspend, restore; bhyvectl: %s', (bhyvectl) =>
      scene({ generation, bhyvectl }, async (all) => {
        const { host, boot, checkpoint, control, tree, vm } = all;
        let guest = await boot();
        await mkdir(checkpoint('one'));
        expect(await compared(host, checkpoint('one'))).toBe(`restored ${BLOCKS}`);
        await expectToRun(guest, all);
        await control('suspend two');
        expect(await guest.ended).toBe(0);
        expect(await compared(host, checkpoint('two'))).toBe(`restored ${BLOCKS}`);
        guest = await boot({ args: ['-r', state(checkpoint('two'))] });
        expect(guest.lines()[0]).toBe(`restored ${BLOCKS}`);
        expect(guest.lines()).not.toContain('empty connection');
        if (bhyvectl) {
          expect(await host.bhyvectlCalls()).toEqual([
            `--vm=${vm} --rundir=${host.runDirectory} --checkpoint=${tree.path('disk', '.incoming', '1', 'state')}`,
            `--vm=${vm} --rundir=${host.runDirectory} --suspend=${tree.path('disk', '.incoming', '2', 'state')}`,
          ]);
        }
      }),
    );
  });

  describe('a guest that fails', () => {
    const steps = (first: number, last: number): number[] =>
      Array.from({ length: last - first + 1 }, (_, index) => first + index);

    it.each([false, true])('that dies at any step leaves no trace; bhyvectl: %s', (bhyvectl) =>
      scene({ bhyvectl }, async (all) => {
        for (const step of bhyvectl ? [1, 6, 9, 13] : steps(1, 13)) {
          const guest = await all.boot();
          await guest.setFault(`die ${step}`);
          expect(await refusal(all, `step${step}`), `step ${step}`).toMatch(/^EIO: .*(ended|died)/);
          await guest.ended;
          await expectNoTrace(all);
        }
        await expectToRun(await all.boot(), all);
      }),
    );

    it('that hangs is given up, and no trace is left', () =>
      scene({ timeoutSeconds: 1 }, async (all) => {
        for (const step of [1, 4, 6, 7, 10, 13]) {
          const guest = await all.boot();
          await guest.setFault(`hang ${step}`);
          expect(await refusal(all, `step${step}`), `step ${step}`).toMatch(/^ETIMEDOUT: .*within 1 s/);
          await expectNoTrace(all);
          guest.kill();
          await guest.ended;
        }
        await expectToRun(await all.boot(), all);
      }));

    it.each<[Fault, Generation, RegExp]>([
      ['unsavable', 'D', /^EIO: .*not usable/],
      ['unsavable', 'E', /^EIO: .*Operation not supported/],
      ['nonsense', 'C', /^EIO: .*no JSON/],
      ['short', 'D', /^EIO: .*has 524288 bytes, and the guest has 1048576/],
      ['refuse', 'C', /^EIO: /],
    ])('%s, generation %s: refused, and it runs on', (fault, generation, sentence) =>
      scene({ generation }, async (all) => {
        const guest = await all.boot();
        await guest.setFault(fault);
        expect(await refusal(all, 'bad')).toMatch(sentence);
        await expectNoTrace(all);
        await expectToRun(guest, all);
        await guest.setFault('fine');
        await mkdir(all.checkpoint('good'));
        expect(await compared(all.host, all.checkpoint('good'))).toBe(`restored ${BLOCKS}`);
      }),
    );

    it('that dies while it is suspended leaves no trace', () =>
      scene({}, async (all) => {
        const guest = await all.boot();
        await guest.setFault('die 9');
        await expect(all.control('suspend gone')).rejects.toThrow(/^EIO/);
        await expectNoTrace(all);
      }));
  });

  describe('without memory', () => {
    it('a guest that is off: the disk alone', () =>
      scene({}, async ({ checkpoint, control }) => {
        await mkdir(checkpoint('off'));
        expect(await readdir(checkpoint('off'))).not.toContain('state');
        const info = JSON.parse(await readFile(join(checkpoint('off'), 'info.json'), 'utf8'));
        expect(info.consistency).toBe('crash');
        await expect(control('restore-command off')).rejects.toThrow(/^ENOTSUP/);
        await expect(control('suspend now')).rejects.toThrow();
      }));

    it('--no-memory does not disturb the guest; bhyve without snapshots has nothing else', () =>
      scene({ generation: 'none' }, async (all) => {
        const { tree, checkpoint } = all;
        const guest = await all.boot();
        expect(await refusal(all, 'whole')).toMatch(/^ENOTSUP: .*--no-memory/);
        await expectNoTrace(all);
        const done = await vdskfs(['checkpoint', tree.path('disk'), 'disk-only', '--no-memory']);
        expect(done).toMatchObject({ status: 0, stderr: '' });
        expect(await readdir(checkpoint('disk-only'))).not.toContain('state');
        await expectToRun(guest, all);
      }));
  });

  describe('control', () => {
    it('forwards what bhyvectl can do, and says what bhyve cannot', () =>
      scene({ bhyvectl: true }, async ({ host, boot, control, vm }) => {
        await boot();
        expect(await control('stats')).toContain('vm exits');
        await control('nmi');
        await control('reset');
        await control('poweroff');
        await control('guest --get-stats --inject-nmi');
        expect(await host.bhyvectlCalls()).toEqual(
          ['--get-stats', '--inject-nmi', '--force-reset', '--force-poweroff', '--get-stats --inject-nmi'].map(
            (words) => `--vm=${vm} --rundir=${host.runDirectory} ${words}`,
          ),
        );
        await expect(control('pause')).rejects.toThrow(/^ENOTSUP/);
        await expect(control('resume')).rejects.toThrow(/^ENOTSUP/);
      }));
  });

  describe('vdskfs restore', () => {
    it('rolls back and starts bhyve from the checkpoint', () =>
      scene({}, async ({ host, tree, boot, checkpoint, vm, disk }) => {
        const guest = await boot();
        await mkdir(checkpoint('good'));
        const words = ['--', join(host.bin, 'bhyve'), '-A', '-s', `3,virtio-blk,${disk}`, vm];
        const args = [launcher, 'restore', tree.path('disk'), 'good', ...words];
        const env = { ...host.env, BHYVE_COMPARE: '1' };
        const busy = await run(process.execPath, args, { env });
        expect(busy).toMatchObject({ status: 1, stderr: expect.stringContaining('runs') });
        guest.kill();
        await guest.ended;
        expect(await runOk(process.execPath, args, { env })).toBe(`restored ${BLOCKS}\n`);
      }));
  });

  it('vdskfs restore rolls back every disk of the guest', () =>
    scene({ disks: 2 }, async ({ host, tree, boot, vm, disk, disk2 }) => {
      const guest = await boot();
      await mkdir(tree.path('disk2', 'snapshots', 'both'));
      await expectChange(disk2);
      guest.kill();
      await guest.ended;
      const devices = ['-s', `3,virtio-blk,${disk}`, '-s', `4,virtio-blk,${disk2}`];
      const restored = await vdskfs(
        ['restore', tree.path('disk'), 'both', '--', join(host.bin, 'bhyve'), '-H', ...devices, vm],
        { env: { ...host.env, BHYVE_COMPARE: '1' } },
      );
      expect(restored).toMatchObject({ status: 0, stdout: `restored ${2 * BLOCKS}\n`, stderr: '' });
    }));

  it('a server that is killed while a guest saves its state leaves no trace of it', () =>
    withDirectory(async (directory) => {
      const host = await installBhyve(directory);
      const image = join(directory, 'vm.qcow2');
      const vm = `e2e${process.pid}-killed`;
      await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M']);
      const mounted = <T>(body: (tree: MountedTree) => Promise<T>): Promise<T> =>
        withMount(image, { args: ['--guest', `vm=bhyve:${vm}`], env: host.env }, body);
      await mounted(async (tree) => {
        const guest = await startGuest(host, vm, { disks: [tree.path('vm', 'disk.raw')], delayUs: 100 });
        try {
          await mkdir(tree.path('vm', 'snapshots', 'before'));
          await guest.setFault('hang 9');
          const taken = mkdir(tree.path('vm', 'snapshots', 'torn')).then(
            () => 'taken',
            () => 'failed',
          );
          const kern = tree.path('vm', '.incoming', '2', 'state.kern');
          await expect.poll(async () => (await stat(kern).catch(() => ({ size: 0 }))).size).toBeGreaterThan(200);
          tree.signal('SIGKILL');
          await tree.ended;
          expect(await taken).toBe('failed');
        } finally {
          guest.kill();
          await guest.ended;
        }
      });
      await mounted(async (tree) => {
        expect(await readdir(tree.path('vm', 'snapshots'))).toEqual(['before']);
        expect(await compared(host, tree.path('vm', 'snapshots', 'before'))).toBe(`restored ${BLOCKS}`);
      });
      await runOk('qemu-img', ['check', image]);
    }));

  it('a host disk that is too small for the memory: ENOSPC, the guest runs on', () =>
    withDirectory(async (directory) => {
      const host = await installBhyve(directory);
      const small = join(directory, 'small');
      const image = join(small, 'vm.qcow2');
      const vm = `e2e${process.pid}-full`;
      await mkdir(small);
      await runOk('mount', ['-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', small]);
      try {
        await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M']);
        await withMount(image, { args: ['--guest', `vm=bhyve:${vm}`], env: host.env }, async (tree) => {
          const disk = tree.path('vm', 'disk.raw');
          const guest = await startGuest(host, vm, { disks: [disk], delayUs: 100, memoryBytes: 80 << 20 });
          try {
            await expect(mkdir(tree.path('vm', 'snapshots', 'large'))).rejects.toMatchObject({ code: 'ENOSPC' });
            expect(await readFile(tree.path('vm', 'control'), 'utf8')).toContain('disk is full');
            expect(await readdir(tree.path('vm', 'snapshots'))).toEqual([]);
            await expectChange(disk);
            await mkdir(tree.path('vm', 'overlays', 'large')).catch((error) => expect(error.code).toBe('ENOSPC'));
            expect(await readdir(tree.path('vm', 'overlays'))).toEqual([]);
            await expectChange(disk);
          } finally {
            guest.kill();
            await guest.ended;
          }
        });
        await runOk('qemu-img', ['check', image]);
      } finally {
        await runOk('umount', [small]);
      }
    }));

  it('a guest of the name of its disk is found by itself, unless it is told that there is none', () =>
    withDirectory(async (directory) => {
      const host = await installBhyve(directory);
      const vm = `e2e${process.pid}-found`;
      const image = join(directory, `${vm}.qcow2`);
      await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M']);
      for (const args of [[], ['--guest', `${vm}=none`]]) {
        const name = `with${args.length}`;
        await withMount(image, { args, env: host.env }, async (tree) => {
          const guest = await startGuest(host, vm, { disks: [tree.path(vm, 'disk.raw')], delayUs: 100 });
          try {
            await mkdir(tree.path(vm, 'snapshots', name));
            expect((await readdir(tree.path(vm, 'snapshots', name))).includes('state')).toBe(args.length === 0);
          } finally {
            guest.kill();
            await guest.ended;
          }
        });
      }
    }));

  it('restore-command still works after everything was restarted, and takes the devices of --guest-config', () =>
    withDirectory(async (directory) => {
      const host = await installBhyve(directory, { osreldate: 1_401_000 });
      const image = join(directory, 'vm.qcow2');
      const config = join(directory, 'vm.sh');
      const vm = `e2e${process.pid}-again`;
      await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M']);
      const mounted = <T>(args: readonly string[], body: (tree: MountedTree) => Promise<T>): Promise<T> =>
        withMount(image, { args: ['--guest', `vm=bhyve:${vm}`, ...args], env: host.env }, body);
      const restoreCommand = async (tree: MountedTree): Promise<string> => {
        await writeFile(tree.path('vm', 'control'), 'restore-command good');
        return readFile(tree.path('vm', 'control'), 'utf8');
      };

      await mounted([], async (tree) => {
        const guest = await startGuest(host, vm, { disks: [tree.path('vm', 'disk.raw')] });
        try {
          await mkdir(tree.path('vm', 'snapshots', 'good'));
        } finally {
          guest.kill();
          await guest.ended;
        }
      });
      await mounted([], async (tree) => {
        const [line, ...notes] = (await restoreCommand(tree)).split('\n');
        expect(line).toMatch(/^bhyve -r \S+\/vm\/snapshots\/good\/state .* 3,virtio-blk,\S+\/vm\/disk\.raw /);
        expect(line).toMatch(new RegExp(` ${vm}$`));
        expect(notes.join('\n')).toContain('# How the guest was started is not known');
        const info = JSON.parse(await readFile(tree.path('vm', 'snapshots', 'good', 'info.json'), 'utf8'));
        expect(info.guest).toMatchObject({ name: vm, hostRelease: '1401000' });
      });
      await writeFile(config, `bhyve -c 2 -H \\\n  -s '5,nvme,/other disk' ${vm}\n`);
      await writeFile(join(host.bin, 'sysctl'), '#!/bin/sh\necho 1402000\n');
      await mounted(['--guest-config', config], async (tree) => {
        const text = await restoreCommand(tree);
        expect(text).toMatch(new RegExp(`^bhyve -r \\S+ -c 2 -H -s '5,nvme,/other disk' ${vm}\n`));
        expect(text).toContain(
          '# The checkpoint was saved on a host with kern.osreldate 1401000, this one has 1402000',
        );
        expect(text).toContain("# None of the guest's devices is the disk");
      });
    }));
}
