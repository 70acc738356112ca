import { spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  chmodSync,
  closeSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { processStart } from '../../src/cli/process.ts';
import {
  isServing,
  logFile,
  openLog,
  readState,
  readStates,
  removeState,
  type ServerState,
  servedImage,
  stateDirectory,
  writeState,
} from '../../src/cli/state.ts';

let parent: string;
let image: string;
beforeEach(() => {
  parent = mkdtempSync(join(tmpdir(), 'vdskfs-state-'));
  image = join(parent, 'vm1.qcow2');
  writeFileSync(image, '');
  vi.stubEnv('VDSKFS_STATE_DIR', join(parent, 'state'));
});
afterEach(() => {
  vi.unstubAllEnvs();
  rmSync(parent, { recursive: true });
});

const state = (changes: Partial<ServerState> = {}): ServerState => ({
  pid: process.pid,
  processStart: processStart(process.pid) ?? '',
  mountpoint: '/mnt/vms',
  driver: 'native',
  readOnly: false,
  startedMs: 1_700_000_000_000,
  disks: [{ name: 'vm1', image }],
  ...changes,
});

describe('the state of a mount', () => {
  it('is read back as it was written, by its mountpoint', () => {
    writeState(state());
    expect(readState('/mnt/vms')).toEqual(state());
    expect(readState('/mnt/other')).toBeUndefined();
  });

  it('is replaced as a whole, leaving no other file', () => {
    writeState(state());
    writeState(state({ failure: 'the disk was full' }));
    expect(readStates()).toEqual([state({ failure: 'the disk was full' })]);
    expect(readdirSync(stateDirectory())).toHaveLength(1);
  });

  it('is gone when it is removed, and removing it again is no failure', () => {
    writeState(state());
    removeState('/mnt/vms');
    removeState('/mnt/vms');
    expect(readStates()).toEqual([]);
  });

  it('that cannot be understood counts as none', () => {
    writeState(state());
    writeFileSync(join(stateDirectory(), 'broken.json'), '{"pid":');
    writeFileSync(join(stateDirectory(), 'foreign.json'), '[]');
    expect(readStates()).toEqual([state()]);
  });

  it('is for its owner only', () => {
    writeState(state());
    expect(statSync(stateDirectory()).mode & 0o777).toBe(0o700);
  });

  it('is not kept where others can write', () => {
    chmodSync(stateDirectory(), 0o777);
    expect(() => stateDirectory()).toThrow('must be a directory of yours that no one else can write');
  });
});

describe('a serving process', () => {
  it('is the one with that id and that start', () => {
    expect(isServing(state())).toBe(true);
    expect(isServing(state({ processStart: 'another' }))).toBe(false);
  });

  it('that has ended is none', async () => {
    const child = spawn(process.execPath, ['-e', 'process.stdin.resume()'], { stdio: ['pipe', 'ignore', 'ignore'] });
    const pid = child.pid ?? 0;
    const ended = state({ pid, processStart: processStart(pid) ?? '' });
    expect(isServing(ended)).toBe(true);
    child.stdin.end();
    await once(child, 'exit');
    expect(isServing(ended)).toBe(false);
  });

  it('is found by an image it serves', () => {
    writeState(state());
    expect(servedImage(image)).toEqual({ pid: process.pid, mountpoint: '/mnt/vms', directory: '/mnt/vms/vm1' });
    expect(servedImage(join(parent, 'missing'))).toBeUndefined();
    writeState(state({ processStart: 'ended long ago' }));
    expect(servedImage(image)).toBeUndefined();
  });
});

describe('the log of a mount', () => {
  const write = (text: string): void => {
    const { fd } = openLog('/mnt/vms');
    writeSync(fd, text);
    closeSync(fd);
  };

  it('starts empty for each server', () => {
    write('old');
    write('new');
    expect(readFileSync(logFile('/mnt/vms'), 'utf8')).toBe('new');
  });

  it('stays when the mount ends, unless nothing is in it', () => {
    write('');
    removeState('/mnt/vms');
    expect(existsSync(logFile('/mnt/vms'))).toBe(false);
    write('something');
    removeState('/mnt/vms');
    expect(existsSync(logFile('/mnt/vms'))).toBe(true);
  });

  it('is left alone while a server writes it', () => {
    write('of the server; ');
    writeState(state());
    write('of a second one');
    expect(readFileSync(logFile('/mnt/vms'), 'utf8')).toBe('of the server; of a second one');
  });
});
