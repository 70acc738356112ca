import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { AttachedCheckpoints } from '../../../src/guest/guest.ts';
import { QemuGuest } from '../../../src/guest/qemu/qemu-guest.ts';
import { run, runOk } from '../../e2e/run.ts';
import { failureOf } from './fake-qemu.ts';
import { QEMU, qmpArgument, type RealQemu, startQemu } from './real-qemu.ts';

let folder: string;
let image: string;
let qemu: RealQemu;
let guest: QemuGuest;
let attached: AttachedCheckpoints;

const path = (name: string) => join(folder, name);

/** A machine without anything but the disk, which is enough to write to it. */
const start = (file: string) =>
  startQemu(folder, QEMU, [
    ...['-machine', 'none', '-nodefaults', '-display', 'none', '-qmp', qmpArgument(folder)],
    ...['-drive', `if=none,id=disk0,format=qcow2,file=${file}`],
  ]);

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'vdskfs-attached-'));
  image = path('vm1.qcow2');
  await runOk('qemu-img', ['create', '-q', '-f', 'qcow2', image, '64M']);
  qemu = await start(image);
  guest = new QemuGuest({ socketPath: qemu.socketPath, attachedImage: image });
  attached = guest.attached as AttachedCheckpoints;
});

afterEach(async () => {
  await qemu[Symbol.asyncDispose]();
  rmSync(folder, { recursive: true });
});

/** Fill `MiB` MiB of the guest's disk, from its start, with a byte. */
async function write(byte: number, MiB = 1): Promise<void> {
  const command = { 'command-line': `qemu-io disk0 "write -P ${byte} 0 ${MiB}M"` };
  await guest.forward(JSON.stringify({ execute: 'human-monitor-command', arguments: command }));
}

/** After QEMU has ended: whether the first MiB of a file, or of a snapshot in it, is of one byte. */
async function holds(file: string, byte: number, snapshot?: string): Promise<boolean> {
  const from = snapshot === undefined ? [] : ['-l', `snapshot.name=${snapshot}`];
  await runOk('qemu-img', ['convert', ...from, '-O', 'raw', file, path('out.raw')]);
  const read = await run('qemu-io', ['-r', '-f', 'raw', '-c', `read -P ${byte} 0 1M`, path('out.raw')]);
  return read.status === 0 && !read.stdout.includes('Pattern verification failed');
}

const none = () => {};

describe('internal checkpoints of an image that QEMU has open', () => {
  it('are taken and deleted by QEMU', async () => {
    await write(1);
    await attached.take('internal', 'one');
    await write(2);
    await attached.take('internal', 'two');
    await attached.delete('internal', 'two', none);
    await write(3);
    expect(await failureOf(attached.take('internal', 'one'))).toMatchObject({ errno: 'EEXIST' });
    expect(await failureOf(attached.delete('internal', 'two', none))).toMatchObject({ errno: 'ENOENT' });
    await guest.poweroff();
    expect(await holds(image, 1, 'one')).toBe(true);
    expect(await holds(image, 3)).toBe(true);
    expect(await runOk('qemu-img', ['snapshot', '-l', image])).not.toContain('two');
    await runOk('qemu-img', ['check', '-q', image]);
  });

  it('in a layer that is read only they are refused with the layer that has them', async () => {
    await attached.take('internal', 'low');
    await attached.take('external', 'high');
    const failure = await failureOf(attached.delete('internal', 'low', none));
    expect(failure.errno).toBe('EBUSY');
    expect(failure.message).toContain(image);
  });
});

describe('external checkpoints of an image that QEMU has open', () => {
  const backing = async (name: string) =>
    JSON.parse(await runOk('qemu-img', ['info', '-U', '--output=json', path(name)]))['backing-filename'];

  it('are files beside it that find each other by relative names', async () => {
    await write(1);
    await attached.take('external', 'one');
    await write(2);
    await attached.take('external', 'two');
    await write(3);
    expect([await backing('one.qcow2'), await backing('two.qcow2')]).toEqual(['vm1.qcow2', 'one.qcow2']);
    await guest.poweroff();
    expect(await holds(image, 1)).toBe(true);
    expect(await holds(path('one.qcow2'), 2)).toBe(true);
    expect(await holds(path('two.qcow2'), 3)).toBe(true);
  });

  it.each([
    ['the active one', 'three', ['one', 'two'], [1, 2, 9]],
    ['one in the middle', 'two', ['one', 'three'], [1, 3, 9]],
    ['the oldest', 'one', ['two', 'three'], [2, 3, 9]],
  ])('deleting merges into the layer below: %s', async (_which, name, left, contents) => {
    await write(1);
    for (const [at, point] of ['one', 'two', 'three'].entries()) {
      await attached.take('external', point);
      await write(at + 2, at + 1);
    }
    const fractions: number[] = [];
    await attached.delete('external', name, (fraction) => fractions.push(fraction));
    expect(fractions.at(-1)).toBe(1);
    expect(existsSync(path(`${name}.qcow2`))).toBe(false);
    expect([await backing(`${left[0]}.qcow2`), await backing(`${left[1]}.qcow2`)]).toEqual([
      'vm1.qcow2',
      `${left[0]}.qcow2`,
    ]);
    await write(9);
    await guest.poweroff();
    for (const [at, file] of [image, ...left.map((point) => path(`${point}.qcow2`))].entries()) {
      await runOk('qemu-img', ['check', '-q', file]);
      expect(await holds(file, contents[at] as number)).toBe(true);
    }
  });

  it('one that holds internal snapshots stays', async () => {
    await attached.take('external', 'one');
    await attached.take('internal', 'inside');
    const failure = await failureOf(attached.delete('external', 'one', none));
    expect(failure.errno).toBe('EBUSY');
    expect(failure.message).toContain('"inside"');
    expect(existsSync(path('one.qcow2'))).toBe(true);
  });

  it('a file of that name is never written over: the second name is taken, then none', async () => {
    writeFileSync(path('one.qcow2'), 'precious');
    await attached.take('external', 'one');
    expect(await backing('vm1~one.qcow2')).toBe('vm1.qcow2');
    expect(await failureOf(attached.take('external', 'one'))).toMatchObject({ errno: 'EEXIST' });
    writeFileSync(path('two.qcow2'), 'precious');
    writeFileSync(path('vm1~two.qcow2'), 'precious');
    expect(await failureOf(attached.take('external', 'two'))).toMatchObject({ errno: 'EEXIST' });
    expect(await failureOf(attached.delete('external', 'two', none))).toMatchObject({ errno: 'ENOENT' });
  });

  it('a job that QEMU ends early leaves the chain as it was, and is told', async () => {
    await attached.take('external', 'one');
    await write(5, 64);
    await attached.take('external', 'two');
    const job = attached.delete('external', 'one', none);
    const kill = async () => {
      const jobs = JSON.parse(await guest.forward('{"execute": "query-jobs"}'));
      if (jobs[0] === undefined) return false;
      const { id } = jobs[0];
      await guest.forward(JSON.stringify({ execute: 'block-job-set-speed', arguments: { device: id, speed: 1024 } }));
      await guest.forward(JSON.stringify({ execute: 'job-cancel', arguments: { id } }));
      return true;
    };
    const failure = failureOf(job);
    while (!(await kill().catch(() => true)));
    const { errno, message } = await failure;
    // It may have been quicker than we were.
    if (errno === 'none') return;
    expect(errno).toBe('EIO');
    expect(message).toContain('block-commit failed');
    expect(await backing('two.qcow2')).toBe('one.qcow2');
  });
});

describe('an image that this QEMU does not have', () => {
  it('is refused with the sentence', async () => {
    const other = new QemuGuest({ socketPath: qemu.socketPath, attachedImage: path('other.qcow2') });
    expect(await failureOf(other.attached?.take('internal', 'one') ?? Promise.resolve())).toMatchObject({
      errno: 'ENXIO',
      message: expect.stringContaining('other.qcow2'),
    });
  });
});
