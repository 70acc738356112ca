import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { describe, expect, it } from 'vitest';
import { parseCommandLine, parsePs, processes, processOf } from '../../src/os/process-list.ts';

describe('the arguments in /proc/PID/cmdline', () => {
  it.each([
    ['bhyve\0-c\x002\0a b\0web0\0', ['bhyve', '-c', '2', 'a b', 'web0']],
    ['bhyve\0-l\0\0web0\0', ['bhyve', '-l', '', 'web0']],
    ['bhyve: web0\0', ['bhyve: web0']],
    // A title over longer arguments, the rest of which was cleared.
    [`bhyve: web0${'\0'.repeat(80)}`, ['bhyve: web0']],
    ['without NUL', ['without NUL']],
    ['', []],
  ])('%j', (text, argv) => {
    expect(parseCommandLine(Buffer.from(text))).toEqual(argv);
  });
});

describe('what ps prints', () => {
  it.each([
    ['  812 Is   /usr/sbin/syslogd -s\n', [{ pid: 812, argv: ['/usr/sbin/syslogd', '-s'] }]],
    // setproctitle(3), with and without the name of the program behind it.
    ['12345 SC   bhyve: web0\n', [{ pid: 12345, argv: ['bhyve: web0'] }]],
    ['12345 SC   bhyve: web0 (bhyve)\n', [{ pid: 12345, argv: ['bhyve: web0'] }]],
    ['   11 RNL  [idle]\n', [{ pid: 11, argv: ['[idle]'] }]],
    ['  900 Z    <defunct>\n', []],
    ['  901 RE   bhyve: web1\n', []],
    ['\n', []],
    ['ps: no such thing\n', []],
  ])('%j', (text, expected) => {
    expect(parsePs(text)).toEqual(expected);
  });
});

it('the processes of this host: this one is there, one that has ended is not', async () => {
  const child = spawn(process.execPath, ['-e', 'setInterval(() => {}, 1000)', 'a word', 'last']);
  await once(child, 'spawn');
  const pid = child.pid as number;
  try {
    expect(await processOf(process.pid)).toMatchObject({ pid: process.pid });
    await expect.poll(async () => (await processOf(pid))?.argv.at(-1)).toBe('last');
    expect((await processes()).map((one) => one.pid)).toEqual(expect.arrayContaining([process.pid, pid]));
  } finally {
    child.kill('SIGKILL');
    await once(child, 'exit');
  }
  expect(await processOf(pid)).toBeUndefined();
});
