/**
 * A stand-in for a bhyve that is built with libvdsk: a process that holds a qcow2 image, writes it, and changes it when
 * bhyvectl asks. qemu-storage-daemon does the holding, with QEMU's own locks; the bhyvectl here speaks QMP to it.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { writeFile } from 'node:fs/promises';
import { connect } from 'node:net';
import { dirname, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { run, runOk } from '../e2e/run.ts';
import type { BhyveHost } from './bhyve.ts';

export interface HoldingGuest {
  /** Write one byte value over a range of the guest's disk. */
  write(value: number, offset: number, bytes: number): Promise<void>;
  kill(): void;
  readonly ended: Promise<void>;
}

const running = new Set<ChildProcess>();
process.on('exit', () => {
  for (const child of running) child.kill('SIGKILL');
});

/** What bhyvectl does there: a program of Node's, which does with QMP what was asked and waits for its end. */
const BHYVECTL = (qmp: string, image: string, log: string): string => `#!${process.execPath}
const { connect } = require('node:net');
const { appendFileSync, existsSync, unlinkSync } = require('node:fs');
const words = process.argv.slice(2);
appendFileSync(${JSON.stringify(log)}, words.join(' ') + '\\n');
const socket = connect(${JSON.stringify(qmp)});
let text = '';
const waiting = [];
socket.setEncoding('utf8').on('data', (part) => {
  text += part;
  for (let end; (end = text.indexOf('\\n')) >= 0; text = text.slice(end + 1)) {
    const message = JSON.parse(text.slice(0, end));
    if ('return' in message) waiting.shift().resolve(message.return);
    else if ('error' in message) waiting.shift().reject(new Error(message.error.desc));
  }
});
const ask = (execute, args = {}) => new Promise((resolve, reject) => {
  waiting.push({ resolve, reject });
  socket.write(JSON.stringify({ execute, arguments: args }) + '\\n');
});
const overlay = (name) => ${JSON.stringify(dirname(image))} + '/' + name + '.qcow2';
async function act([option, name]) {
  await ask('qmp_capabilities');
  if (option === '--checkpoint') await ask('blockdev-snapshot-internal-sync', { device: 'disk', name });
  else if (option === '--del-checkpoint') await ask('blockdev-snapshot-delete-internal-sync', { device: 'disk', name });
  else if (option === '--ext-checkpoint') {
    if (existsSync(overlay(name))) throw new Error(name + ' exists');
    const names = { 'node-name': 'disk', 'snapshot-file': overlay(name), 'snapshot-node-name': 'over-' + name };
    await ask('blockdev-snapshot-sync', { ...names, format: 'qcow2' });
  } else if (option === '--del-ext-checkpoint') {
    await ask('block-commit', { 'job-id': 'merge', device: 'over-' + name });
    for (;;) {
      const [job] = await ask('query-jobs');
      if (job?.status === 'ready') await ask('job-complete', { id: 'merge' });
      if (job === undefined || job.status === 'concluded') break;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    unlinkSync(overlay(name));
  } else throw new Error('unrecognized option ' + option);
}
act(words).then(() => socket.destroy(), (error) => {
  console.error(error.message);
  process.exit(1);
});
`;

/** Start the process that holds `image`; bhyvectl of `host` then works on it. The caller ends it. */
export async function holdImage(host: BhyveHost, image: string, log: string): Promise<HoldingGuest> {
  const directory = dirname(host.bin);
  const qmp = join(directory, 'qmp');
  const nbd = join(directory, 'nbd');
  await writeFile(join(host.bin, 'bhyvectl'), BHYVECTL(qmp, image, log), { mode: 0o755 });
  const words = [
    ...['--chardev', `socket,path=${qmp},server=on,wait=off,id=monitor`, '--monitor', 'chardev=monitor'],
    ...['--blockdev', `driver=qcow2,node-name=disk,file.driver=file,file.filename=${image}`],
    ...['--nbd-server', `addr.type=unix,addr.path=${nbd}`],
    ...['--export', 'type=nbd,id=export,node-name=disk,name=disk,writable=on'],
  ];
  const child = spawn('qemu-storage-daemon', words, { stdio: ['ignore', 'ignore', 'pipe'] });
  running.add(child);
  let complaint = '';
  child.stderr.setEncoding('utf8').on('data', (part: string) => {
    complaint += part;
  });
  let over = false;
  const ended = new Promise<void>((resolve, reject) => {
    child.on('error', reject);
    child.on('close', () => {
      over = true;
      running.delete(child);
      resolve();
    });
  });
  while (!(await accepts(nbd))) {
    if (over) throw new Error(`qemu-storage-daemon: ${complaint}`);
    await sleep(20);
  }
  const url = `nbd+unix:///disk?socket=${nbd}`;
  return {
    async write(value, offset, bytes) {
      await runOk('qemu-io', ['-f', 'raw', '-c', `write -q -P ${value} ${offset} ${bytes}`, '-c', 'flush', url]);
    },
    kill: () => void child.kill('SIGKILL'),
    ended,
  };
}

/** Whether someone listens at a socket. */
const accepts = (path: string): Promise<boolean> =>
  new Promise((resolve) => {
    const socket = connect(path);
    socket.on('connect', () => {
      socket.destroy();
      resolve(true);
    });
    socket.on('error', () => resolve(false));
  });

/** Whether someone else holds the image, so that QEMU's tools do not write it. */
export async function isHeld(image: string): Promise<boolean> {
  const { stderr } = await run('qemu-img', ['snapshot', '-c', 'x', image]);
  return /lock/.test(stderr);
}
