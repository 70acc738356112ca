/** Checkpoints of real QEMU guests, with memory: taken, rolled back to, restored; and all that goes wrong on the way. */
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { mkdir, readdir, readFile, rmdir } from 'node:fs/promises';
import { connect } from 'node:net';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { QemuGuest } from '../../src/guest/qemu/qemu-guest.ts';
import { QEMU, qmpArgument, qmpSocket, startQemu } from '../guest/qemu/real-qemu.ts';
import { driver, launcher, type MountedTree, withMount } from './mount.ts';
import { runOk, withDirectory } from './run.ts';
import { GuestConsole, tinyLinux } from './tiny-linux.ts';

/** Unique on this machine: a bhyve VM or another run of this test may have a plain one. */
const DISK = `vm${process.pid}`;
const SIZE = '16M';

interface Served {
  readonly directory: string;
  readonly tree: MountedTree;
  readonly image: string;
  readonly disk: string;
  /** Write one command, read its answer. */
  control(command: string): string;
  status(): Record<string, string>;
}

/** A mounted disk whose guest has its QMP socket in `directory`. */
function withServed(args: readonly string[], body: (served: Served) => Promise<void>): Promise<void> {
  return withDirectory(async (directory) => {
    const image = join(directory, `${DISK}.qcow2`);
    await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, SIZE]);
    const guest = ['--guest', `${DISK}=qmp:${qmpSocket(directory)}`];
    await withMount(image, { args: [...guest, ...args] }, async (tree) => {
      const file = tree.path(DISK, 'control');
      const control = (command: string) => {
        writeFileSync(file, command);
        return readFileSync(file, 'utf8');
      };
      const status = () =>
        Object.fromEntries(
          control('status')
            .trim()
            .split('\n')
            .map((line) => line.split(/: (.*)/s).slice(0, 2)),
        );
      await body({ directory, tree, image, disk: tree.path(DISK, 'disk.raw'), control, status });
    });
    expect(await runOk('qemu-img', ['check', image])).toContain('No errors were found');
  });
}

const infoOf = async (tree: MountedTree, name: string) =>
  JSON.parse(await readFile(tree.path(DISK, 'snapshots', name, 'info.json'), 'utf8'));

/** The number in the first sector of a disk. */
const counterOn = (disk: string): number => Number(readFileSync(disk).subarray(0, 512).toString().trim());

const codeOf = (work: Promise<unknown>): Promise<string> =>
  work.then(
    () => 'none',
    (error: NodeJS.ErrnoException) => error.code ?? String(error),
  );

/** What such a failure is called, and the sentence that `control` gives next. */
async function failure({ tree }: Served, work: Promise<unknown>): Promise<{ errno: string; sentence: string }> {
  const errno = await codeOf(work);
  return { errno, sentence: await readFile(tree.path(DISK, 'control'), 'utf8') };
}

/** From `counter` on: what came after a restore goes on where the disk of the checkpoint ended. */
function expectToGoOn(console: GuestConsole, counter: number): void {
  const [first, ...rest] = console.counters();
  // The number may have been on the disk, and not yet on the console.
  expect([counter, counter + 1]).toContain(first);
  expect(rest).toEqual(rest.map((_, at) => (first as number) + 1 + at));
  expect(console.text()).not.toContain('disagree');
}

describe('a Linux guest', () => {
  it('goes on from a checkpoint as if nothing had happened since', () =>
    withServed([], async (served) => {
      const { directory, tree, disk, control, status } = served;
      const console = new GuestConsole(directory);
      const words = await tinyLinux(directory, DISK, disk);
      expect(status()).toMatchObject({ guest: expect.any(String), alive: 'no', state: 'off' });

      let atFirst: number;
      {
        await using _qemu = await startQemu(directory, QEMU, words);
        expect(status()).toMatchObject({ guest: DISK, kind: 'qemu', alive: 'yes', state: 'running', owner: 'served' });
        const before = await console.waitFor(3);
        await mkdir(tree.path(DISK, 'snapshots', 'first'));
        atFirst = counterOn(tree.path(DISK, 'snapshots', 'first', 'disk.raw'));
        expect(atFirst).toBeGreaterThanOrEqual(before);
        const info = await infoOf(tree, 'first');
        expect(info).toMatchObject({ consistency: 'memory', guest: { kind: 'qemu', name: DISK } });
        expect(info.vmStateSize).toBeGreaterThan(2 ** 20);

        // It runs on, and nobody rolls its disk back under it.
        console.fromHere();
        await console.waitFor(2);
        expect(console.text()).not.toContain('disagree');
        expect(
          (
            await failure(
              served,
              Promise.resolve().then(() => control('rollback first')),
            )
          ).errno,
        ).toBe('EBUSY');

        // Its agent lets it stand still for a checkpoint of the disk alone.
        console.fromHere();
        control('checkpoint frozen --no-memory');
        expect(await infoOf(tree, 'frozen')).toMatchObject({ consistency: 'frozen', vmStateSize: 0 });
        await console.waitForText(/frozen\s+thawed\s+counter/);

        expect(control('pause')).toContain('paused');
        expect(status().state).toBe('paused');
        control('resume');
        expect(control('stats')).toMatch(/virtio0: \d+ reads/);
        expect(JSON.parse(control('guest {"execute": "query-name"}'))).toEqual({ name: DISK });
        expect(control('suspend second')).toContain('the guest has ended');
        expect(status()).toMatchObject({ alive: 'no', state: 'off' });
      }
      const atSecond = counterOn(tree.path(DISK, 'snapshots', 'second', 'disk.raw'));
      expect(atSecond).toBeGreaterThan(atFirst);
      expect(counterOn(disk)).toBe(atSecond);

      // By the line that control prints, then by the command that does all of it.
      control('rollback first');
      expect(counterOn(disk)).toBe(atFirst);
      const line = control('restore-command first').trim();
      expect(line).not.toContain('#');
      let atOverlay = 0;
      for (const [program, args, counter] of [
        ['sh', ['-c', `exec ${line}`], atFirst],
        [process.execPath, [launcher, 'restore', tree.path(DISK), 'second', '--', QEMU, ...words], atSecond],
      ] as const) {
        console.fromHere();
        await using _qemu = await startQemu(directory, program, args);
        await console.waitFor(5);
        expectToGoOn(console, counter);
        expect(status().state).toBe('running');
        if (counter === atSecond) {
          await mkdir(tree.path(DISK, 'overlays', 'outside'));
          atOverlay = counterOn(tree.path(DISK, 'overlays', 'outside', 'disk.raw'));
          expect(atOverlay).toBeGreaterThan(atSecond);
        }
        expect(control('poweroff')).toContain('ended');
      }

      // An external checkpoint has its memory in a file beside it.
      control('rollback outside');
      expect(counterOn(disk)).toBe(atOverlay);
      console.fromHere();
      await using _qemu = await startQemu(directory, 'sh', ['-c', `exec ${control('restore-command outside')}`]);
      await console.waitFor(5);
      expectToGoOn(console, atOverlay);
    }));
});

/** A machine with firmware and a disk, which runs and does nothing: enough for all that is not about its memory. */
const bareMachine = (directory: string, disk: string, more: readonly string[] = []): readonly string[] => [
  ...['-name', DISK, '-accel', 'tcg', '-machine', 'pc', '-m', '1024', '-nodefaults', '-no-user-config'],
  ...['-display', 'none', '-qmp', qmpArgument(directory), '-drive', `file=${disk},format=raw,if=virtio`, ...more],
];

/** A second QMP socket, and what to do at the moment at which the guest is stopped: its state is about to be written. */
function atStop(
  directory: string,
  act: () => void,
): { readonly argument: string; readonly watch: () => Promise<void> } {
  const path = join(directory, 'events.sock');
  const watch = async () => {
    const events = connect(path, () => events.write('{"execute": "qmp_capabilities"}\n'));
    let text = '';
    await new Promise<void>((resolve) => {
      events.on('data', (chunk: Buffer) => {
        text += chunk.toString();
        if (text.includes('"return"')) resolve();
        if (!text.includes('"STOP"')) return;
        events.removeAllListeners('data').resume(); // once
        act();
      });
      events.on('error', () => {}); // QEMU ends
    });
  };
  return { argument: `unix:${path},server=on,wait=off`, watch };
}

describe('when the saving of a guest goes wrong', () => {
  /** No trace of `name`, and the disk goes on. */
  async function expectNothing({ tree, disk, status }: Served): Promise<void> {
    expect(await readdir(tree.path(DISK, 'snapshots'))).toEqual([]);
    expect(status().operation).toBe('idle');
    writeFileSync(disk, 'still written', { flag: 'r+' });
    expect(readFileSync(disk).subarray(0, 13).toString()).toBe('still written');
  }

  it('QEMU dies in the middle: mkdir fails, and nothing of the checkpoint stays', () =>
    withServed([], async (served) => {
      const { directory, tree, disk, status } = served;
      const kill = atStop(directory, () => qemu.process.kill('SIGKILL'));
      await using qemu = await startQemu(directory, QEMU, bareMachine(directory, disk, ['-qmp', kill.argument]));
      await kill.watch();
      const { errno, sentence } = await failure(served, mkdir(tree.path(DISK, 'snapshots', 'lost')));
      expect(errno).toBe('EIO');
      expect(sentence).toContain('QEMU');
      expect(status()).toMatchObject({ alive: 'no', state: 'off' });
      await expectNothing(served);
    }));

  // The same whoever speaks to the kernel, and slow.
  if (driver === 'native')
    it('QEMU hangs in the middle: mkdir gives up, and the guest runs on once it can', () =>
      withServed(['--guest-timeout', '1'], async (served) => {
        const { directory, tree, disk, status } = served;
        const hang = atStop(directory, () => qemu.process.kill('SIGSTOP'));
        await using qemu = await startQemu(directory, QEMU, bareMachine(directory, disk, ['-qmp', hang.argument]));
        await hang.watch();
        const { errno, sentence } = await failure(served, mkdir(tree.path(DISK, 'snapshots', 'lost')));
        expect(errno).toBe('ETIMEDOUT');
        expect(sentence).toContain('--guest-timeout');
        qemu.process.kill('SIGCONT');
        await expect.poll(() => status().state, { timeout: 20_000 }).toBe('running');
        await expectNothing(served);
      }));

  it('a device that cannot be saved: the sentence names it, the guest runs on, and its disk can be kept', () =>
    withServed([], async (served) => {
      const { directory, tree, disk, control, status } = served;
      const nvme = ['-drive', 'if=none,id=scratch,driver=null-co,size=1M', '-device', 'nvme,drive=scratch,serial=1'];
      await using _qemu = await startQemu(directory, QEMU, bareMachine(directory, disk, nvme));
      const { errno, sentence } = await failure(served, mkdir(tree.path(DISK, 'snapshots', 'lost')));
      expect(errno).toBe('EIO');
      expect(sentence).toContain('nvme');
      expect(status().state).toBe('running');
      await expectNothing(served);
      control('checkpoint disk --no-memory');
      expect(await infoOf(tree, 'disk')).toMatchObject({ consistency: 'crash' });
      await rmdir(tree.path(DISK, 'snapshots', 'disk'));
      for (const command of ['reset', 'nmi']) expect(control(command)).not.toBe('');
      expect(status().state).toBe('running');
    }));
});

describe('a guest whose QEMU has the image open itself', () => {
  it('takes and deletes the checkpoints, and the tree shows them', () =>
    withDirectory(async (directory) => {
      const image = join(directory, `${DISK}.qcow2`);
      await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M']);
      await using qemu = await startQemu(directory, QEMU, [
        ...['-name', DISK, '-accel', 'tcg', '-machine', 'pc', '-m', '32', '-nodefaults', '-no-user-config'],
        ...[
          '-display',
          'none',
          '-qmp',
          qmpArgument(directory),
          '-drive',
          `file=${image},format=qcow2,if=none,id=drive`,
        ],
        ...['-device', 'virtio-blk-pci,drive=drive'],
      ]);
      const guest = new QemuGuest({ socketPath: qemu.socketPath });
      const write = (byte: number) => {
        const command = { 'command-line': `qemu-io drive "write -P ${byte} 0 32M"` };
        return guest.forward(JSON.stringify({ execute: 'human-monitor-command', arguments: command }));
      };
      const args = ['--guest', `${DISK}=qmp:${qemu.socketPath}`, '--attached', DISK];
      await withMount(image, { args }, async (tree) => {
        const path = (...names: string[]) => tree.path(DISK, ...names);
        const byteOf = (...names: string[]) => readFileSync(path(...names, 'disk.raw'))[2 ** 20];
        const info = () => JSON.parse(readFileSync(path('info.json'), 'utf8'));
        writeFileSync(path('control'), 'status');
        expect(readFileSync(path('control'), 'utf8')).toMatch(/owner: attached.*alive: yes.*state: running/s);
        expect(info()).toMatchObject({ owner: 'attached', guest: { kind: 'qemu', name: DISK } });
        expect(() => writeFileSync(path('disk.raw'), 'no', { flag: 'r+' })).toThrow(/EACCES|EROFS/);

        await write(1);
        await mkdir(path('snapshots', 'inside'));
        await write(2);
        await mkdir(path('overlays', 'low'));
        await write(3);
        writeFileSync(path('control'), 'ext-checkpoint high');
        await write(4);
        await mkdir(path('snapshots', 'top'));
        expect(byteOf('snapshots', 'inside')).toBe(1);
        expect([byteOf('overlays', 'low'), byteOf('overlays', 'high')]).toEqual([2, 3]);
        expect((await readdir(path('overlays'))).toSorted()).toEqual(['high', 'low']);
        expect((await readdir(path('snapshots'))).toSorted()).toEqual(['inside', 'top']);

        // A file that holds snapshots does not vanish.
        expect(await codeOf(rmdir(path('overlays', 'high')))).toBe('EBUSY');
        expect(readFileSync(path('control'), 'utf8')).toContain('"top"');
        await rmdir(path('snapshots', 'top'));
        await rmdir(path('overlays', 'high'));
        expect(existsSync(join(directory, 'high.qcow2'))).toBe(false);
        expect([byteOf('snapshots', 'inside'), byteOf('overlays', 'low')]).toEqual([1, 2]);
        writeFileSync(path('control'), 'del-ext-checkpoint low');
        await rmdir(path('snapshots', 'inside'));
        expect([await readdir(path('overlays')), await readdir(path('snapshots'))]).toEqual([[], []]);
        await write(5);
        await guest.poweroff();
        expect(await codeOf(mkdir(path('snapshots', 'late')))).not.toBe('none');
      });
      expect(await runOk('qemu-img', ['check', image])).toContain('No errors were found');
      expect(await runOk('qemu-io', ['-r', '-c', 'read -P 5 1M 1M', image])).not.toContain('failed');
    }));
});
