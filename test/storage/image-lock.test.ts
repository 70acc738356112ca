import { type ChildProcess, execFileSync, spawn, spawnSync } from 'node:child_process';
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { describeConflict, lockImage } from '../../src/storage/image-lock.ts';

let folder: string;
let image: string;
let number = 0;
let descriptors: number[] = [];
let programs: ChildProcess[] = [];

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'vdskfs-image-lock-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

beforeEach(() => {
  image = join(folder, `${number++}.qcow2`);
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', image, '1M']);
});
afterEach(async () => {
  for (const fd of descriptors) closeSync(fd);
  descriptors = [];
  await Promise.all(programs.map(end));
  programs = [];
});

async function end(program: ChildProcess): Promise<void> {
  if (program.exitCode !== null || program.signalCode !== null) return;
  const ended = new Promise((resolve) => program.once('exit', resolve));
  program.kill();
  await ended;
}

function open(flags = 'r+'): number {
  const fd = openSync(image, flags);
  descriptors.push(fd);
  return fd;
}

function refusalOf(action: () => void): FsError {
  try {
    action();
  } catch (error) {
    expect(error).toBeInstanceOf(FsError);
    return error as FsError;
  }
  throw new Error('the lock was granted');
}

/** Locks on the image, as "first-last", one per byte range, in order. */
function bytesLocked(): string[] {
  const { ino } = statSync(image);
  return readFileSync('/proc/locks', 'utf8')
    .split('\n')
    .filter((line) => line.includes(`:${ino} `))
    .map((line) => line.trim().split(/\s+/).slice(-2).join('-'))
    .sort();
}

const qemu = (program: string, ...args: string[]) => {
  const { status, stderr, stdout } = spawnSync(program, args, { encoding: 'utf8' });
  return { status, said: stdout + stderr };
};

/** qemu-io with the image open, waiting for its next command. Resolves once it has answered the first. */
async function qemuIoHolding(...options: string[]): Promise<ChildProcess> {
  const program = spawn('qemu-io', [...options, image], { stdio: ['pipe', 'pipe', 'inherit'] });
  programs.push(program);
  program.stdin?.write('length\n');
  await new Promise<void>((resolve, reject) => {
    program.stdout?.on('data', (text) => String(text).includes('1 MiB') && resolve());
    program.once('exit', () => reject(new Error('qemu-io ended')));
  });
  return program;
}

describe.runIf(process.platform === 'linux')('with QEMU', () => {
  it('the bytes of a writer are those that QEMU holds when it writes', async () => {
    await qemuIoHolding();
    const theirs = bytesLocked();
    await end(programs[0] as ChildProcess);
    expect(bytesLocked()).toEqual([]);
    lockImage(open(), image, 'write');
    expect(bytesLocked()).toEqual(theirs);
    expect(theirs).toEqual(['100-101', '103-103', '201-201', '203-203']);
  });

  it('the bytes of a reader are those that QEMU holds when it reads', async () => {
    await qemuIoHolding('-r');
    const theirs = bytesLocked();
    await end(programs[0] as ChildProcess);
    lockImage(open('r'), image, 'read');
    expect(bytesLocked()).toEqual(theirs);
    expect(theirs).toEqual(['100-100', '201-201', '203-203']);
  });

  it('a writer keeps QEMU out, readers too, save one that asks for no lock', () => {
    lockImage(open(), image, 'write');
    const writer = qemu('qemu-io', '-c', 'quit', image);
    expect(writer.status).not.toBe(0);
    expect(writer.said).toMatch(/Failed to get .* lock/);
    expect(qemu('qemu-io', '-r', '-c', 'quit', image).said).toMatch(/Failed to get .* lock/);
    expect(qemu('qemu-img', 'info', image)).toMatchObject({ status: 1 });
    expect(qemu('qemu-img', 'info', '-U', image)).toMatchObject({ status: 0 });
  });

  it("a reader shares with QEMU's readers and keeps its writers out", () => {
    lockImage(open('r'), image, 'read');
    expect(qemu('qemu-img', 'info', image)).toMatchObject({ status: 0 });
    expect(qemu('qemu-io', '-r', '-c', 'quit', image)).toMatchObject({ status: 0 });
    expect(qemu('qemu-io', '-c', 'quit', image).said).toMatch(/Failed to get "write" lock/);
  });

  it('a backing file is held by QEMU as by a reader', async () => {
    const base = image;
    const overlay = join(folder, 'overlay.qcow2');
    execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', base, '-F', 'qcow2', overlay]);
    image = overlay;
    await qemuIoHolding();
    image = base;
    expect(refusalOf(() => lockImage(open(), image, 'write')).errno).toBe('EBUSY');
    lockImage(open('r'), image, 'read');
  });

  it('where QEMU writes, neither reader nor writer gets in, and the message names QEMU', async () => {
    const program = await qemuIoHolding();
    for (const mode of ['read', 'write'] as const) {
      const failure = refusalOf(() => lockImage(open(), image, mode));
      expect(failure.errno).toBe('EBUSY');
      expect(failure.message).toBe(`'${image}' is open for writing in qemu-io (pid ${program.pid}): end that first`);
    }
    await end(program);
    lockImage(open(), image, 'write');
  });

  it('the same with a storage daemon, which is told to stop', async () => {
    const program = spawn(
      'qemu-storage-daemon',
      [
        ...['--blockdev', `driver=file,node-name=file,filename=${image}`],
        ...['--blockdev', 'driver=qcow2,node-name=disk,file=file'],
        ...['--nbd-server', `addr.type=unix,addr.path=${join(folder, 'nbd')}`],
        ...['--export', 'type=nbd,id=export,node-name=disk,writable=on'],
        ...['--chardev', 'stdio,id=monitor', '--monitor', 'monitor'],
      ],
      { stdio: ['pipe', 'pipe', 'inherit'] },
    );
    programs.push(program);
    // The greeting of its monitor comes when everything above is set up.
    await new Promise<void>((resolve, reject) => {
      program.stdout?.once('data', () => resolve());
      program.once('exit', () => reject(new Error('qemu-storage-daemon ended')));
    });
    const failure = refusalOf(() => lockImage(open(), image, 'write'));
    expect(failure.errno).toBe('EBUSY');
    expect(failure.message).toContain(`(pid ${program.pid})`);
  });

  it('where QEMU only reads, readers get in and writers do not', async () => {
    const program = await qemuIoHolding('-r');
    lockImage(open('r'), image, 'read');
    const failure = refusalOf(() => lockImage(open(), image, 'write'));
    expect(failure.errno).toBe('EBUSY');
    expect(failure.message).toMatch(/ is open for reading in .*: end that first, or open it read-only$/);
    await end(program);
  });
});

describe('with each other', () => {
  it('readers share; a writer keeps out readers and writers', () => {
    lockImage(open('r'), image, 'read');
    lockImage(open('r'), image, 'read');
    expect(refusalOf(() => lockImage(open(), image, 'write')).message).toBe(
      `'${image}' is open for reading in this process already: end that first, or open it read-only`,
    );
  });

  it('a writer keeps out readers and writers', () => {
    lockImage(open(), image, 'write');
    for (const mode of ['read', 'write'] as const) {
      expect(refusalOf(() => lockImage(open(), image, mode)).message).toBe(
        `'${image}' is open for writing in this process already: end that first`,
      );
    }
  });

  it('the lock ends with the descriptor', () => {
    const fd = openSync(image, 'r+');
    lockImage(fd, image, 'write');
    closeSync(fd);
    lockImage(open(), image, 'write');
  });

  it('closing another descriptor of the same file keeps the lock', () => {
    lockImage(open(), image, 'write');
    closeSync(openSync(image, 'r+'));
    expect(refusalOf(() => lockImage(open(), image, 'read')).errno).toBe('EBUSY');
  });

  it('a refused lock leaves nothing behind', () => {
    const reader = openSync(image, 'r');
    lockImage(reader, image, 'read');
    const refused = open();
    refusalOf(() => lockImage(refused, image, 'write'));
    closeSync(reader);
    expect(bytesLocked()).toEqual([]);
    lockImage(open(), image, 'write');
  });
});

describe('going from one mode to the other', () => {
  it('a lone reader becomes a writer, and a reader again', () => {
    const fd = open();
    lockImage(fd, image, 'read');
    lockImage(fd, image, 'write', 'read');
    expect(refusalOf(() => lockImage(open('r'), image, 'read')).errno).toBe('EBUSY');
    lockImage(fd, image, 'read', 'write');
    lockImage(open('r'), image, 'read');
  });

  it('a reader that may not become a writer stays a reader', () => {
    const fd = open();
    lockImage(fd, image, 'read');
    const other = openSync(image, 'r');
    lockImage(other, image, 'read');
    refusalOf(() => lockImage(fd, image, 'write', 'read'));
    closeSync(other);
    expect(bytesLocked()).toEqual(['100-100', '201-201', '203-203']);
  });
});

describe('with flock(2), as on FreeBSD', () => {
  beforeEach(() => {
    vi.resetModules();
    vi.doMock('../../src/os/system-calls.ts', async (original) => {
      const { systemCalls } = await original<typeof import('../../src/os/system-calls.ts')>();
      return { systemCalls: () => ({ ...systemCalls(), locking: 'file' }) };
    });
  });
  afterEach(() => {
    vi.doUnmock('../../src/os/system-calls.ts');
    vi.resetModules();
  });

  it('readers share; a writer keeps out readers and writers, and is kept out by them', async () => {
    const { lockImage } = await import('../../src/storage/image-lock.ts');
    const busy = expect.objectContaining({
      errno: 'EBUSY',
      message: `'${image}' is in use in another process: end that first`,
    });
    const [one, other] = [open('r'), open('r+')];
    lockImage(one, image, 'read');
    lockImage(other, image, 'read');
    expect(() => lockImage(other, image, 'write', 'read')).toThrow(busy);
    closeSync(one);
    descriptors = [other];
    lockImage(other, image, 'write');
    expect(() => lockImage(open('r'), image, 'read')).toThrow(busy);
    expect(() => lockImage(open('r+'), image, 'write')).toThrow(busy);
    lockImage(other, image, 'read', 'write');
    lockImage(open('r'), image, 'read');
  });
});

describe('the message', () => {
  it.each([
    ['read', 101, undefined, "'a' is open for writing in another process: end that first"],
    ['write', 103, { pid: 7, program: 'bhyve' }, "'a' is open for writing in bhyve (pid 7): end that first"],
    [
      'write',
      201,
      { pid: 7, program: '' },
      "'a' is open for reading in a process (pid 7): end that first, or open it read-only",
    ],
    ['write', 0, undefined, "'a' is in use in another process: end that first"],
  ] as const)('to a %s refused at byte %i', (mode, offset, holder, sentence) => {
    expect(describeConflict('a', mode, offset, holder)).toBe(sentence);
  });
});
