import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { Monitor } from '../../../src/guest/qemu/monitor.ts';
import { QmpClient } from '../../../src/guest/qemu/qmp-client.ts';
import { failureOf, fakeQemu, greeting, Refusal } from './fake-qemu.ts';

describe('a connection to QEMU', () => {
  it('knows the version from the greeting, and the process at the other end', async () => {
    await using qemu = await fakeQemu({}, { version: [9, 1, 0] });
    using client = await QmpClient.connect(qemu.path);
    expect(client.version).toEqual({ major: 9, minor: 1, text: '9.1.0 (Debian 1)' });
    expect(client.process).toBe(process.pid);
  });

  it('answers belong to commands by id, in whatever order and pieces they come; events are passed over', async () => {
    await using qemu = await fakeQemu({
      first: async (_, connection) => {
        connection.write('{"event": "STOP", "timestamp": {}}\r\n{"ev');
        connection.write('ent": "RESUME"}\n');
        await new Promise((resolve) => setTimeout(resolve, 20));
        return 'one';
      },
      second: ({ value }) => value,
    });
    using client = await QmpClient.connect(qemu.path);
    const order: unknown[] = [];
    await Promise.all([
      client.execute('first').then((answer) => order.push(answer)),
      client.execute('second', { value: { nested: 'é' } }).then((answer) => order.push(answer)),
    ]);
    expect(order).toEqual([{ nested: 'é' }, 'one']);
  });

  it('a refusal has the sentence of QEMU, a command that it does not know is ENOTSUP', async () => {
    await using qemu = await fakeQemu({
      stop: () => {
        throw new Refusal('Not now');
      },
    });
    using client = await QmpClient.connect(qemu.path);
    expect(await failureOf(client.execute('stop'))).toMatchObject({
      errno: 'EIO',
      message: 'QEMU refused stop: Not now.',
    });
    expect(await failureOf(client.execute('fly'))).toMatchObject({ errno: 'ENOTSUP' });
  });

  it('nobody listens: ENOTCONN, whether the socket is not there or was left behind', async () => {
    const gone = await fakeQemu({});
    await gone[Symbol.asyncDispose]();
    expect(await failureOf(QmpClient.connect(gone.path))).toMatchObject({ errno: 'ENOTCONN' });
    await using qemu = await fakeQemu({});
    const stale = join(qemu.folder, 'stale');
    writeFileSync(stale, '');
    expect(await failureOf(QmpClient.connect(stale))).toMatchObject({ errno: 'ENOTCONN' });
  });

  it('no greeting: another client is being served, and the sentence says so', async () => {
    await using qemu = await fakeQemu({}, { greet: () => {} });
    const failure = await failureOf(QmpClient.connect(qemu.path, 50));
    expect(failure.errno).toBe('ETIMEDOUT');
    expect(failure.message).toContain('one client at a time');
  });

  it.each([
    ['no JSON', 'SSH-2.0-OpenSSH\r\n', 'no JSON'],
    ['no greeting', '{"QMP": 3}\r\n', 'the QMP greeting is no object'],
    ['no numbers', '{"QMP": {"version": {"qemu": {"major": "x"}, "package": ""}}}\r\n', 'major is no number'],
    ['an endless line', `[${'1,'.repeat(9 * 1024 * 1024)}`, 'more than 16777216 bytes'],
  ])('what is no QMP is refused: %s', async (_what, said, expected) => {
    await using qemu = await fakeQemu({}, { greet: (connection) => void connection.write(said) });
    const failure = await failureOf(QmpClient.connect(qemu.path));
    expect(failure).toMatchObject({ errno: 'EIO' });
    expect(failure.message).toContain(expected);
  });

  it('hangs up before the greeting', async () => {
    await using qemu = await fakeQemu({}, { greet: (connection) => void connection.destroy() });
    expect(await failureOf(QmpClient.connect(qemu.path))).toMatchObject({ errno: 'EIO' });
  });

  it('dies during a command: the sentence says in which, and later commands fail alike', async () => {
    await using qemu = await fakeQemu({ migrate: (_, connection) => void connection.destroy() });
    using client = await QmpClient.connect(qemu.path);
    const failure = await failureOf(client.execute('migrate'));
    expect(failure.errno).toBe('EIO');
    expect(failure.message).toContain('QEMU did not finish migrate');
    await client.ended;
    expect(await failureOf(client.execute('cont'))).toMatchObject({ errno: 'EIO' });
  });

  it('an answer that comes too late is passed over', async () => {
    let answer = (_: unknown): void => {};
    await using qemu = await fakeQemu({
      slow: () => new Promise((resolve) => (answer = resolve)),
      quick: () => 2,
    });
    using client = await QmpClient.connect(qemu.path);
    expect(await failureOf(client.execute('slow', {}, { timeoutMs: 20 }))).toMatchObject({ errno: 'ETIMEDOUT' });
    answer(1);
    expect(await client.execute('quick')).toBe(2);
  });

  it('answers with what no one asked for, and numbers and lists instead of messages, do no harm', async () => {
    await using qemu = await fakeQemu(
      { quick: () => 2 },
      {
        greet: (connection) =>
          void connection.write(`${greeting()}7\n[]\nnull\n{"return": 1}\n{"return": 1, "id": 99}\n`),
      },
    );
    using client = await QmpClient.connect(qemu.path);
    expect(await client.execute('quick')).toBe(2);
  });
});

describe('a monitor', () => {
  it('has one connection for all who use it at a time, and none when nobody does', async () => {
    await using qemu = await fakeQemu({ quick: () => 2 });
    const monitor = new Monitor(qemu.path);
    const use = () => monitor.use((client) => client.execute('quick'));
    await Promise.all([use(), use(), monitor.use(() => use())]);
    await expect.poll(() => qemu.connections).toEqual({ made: 1, open: 0 });
    await use();
    await expect.poll(() => qemu.connections).toEqual({ made: 2, open: 0 });
  });

  it('connects anew after the connection broke, also for those who come while the others still hold it', async () => {
    await using qemu = await fakeQemu({ quick: () => 2, die: (_, connection) => void connection.destroy() });
    const monitor = new Monitor(qemu.path);
    await monitor.use(async (client) => {
      await failureOf(client.execute('die'));
      await client.ended;
      expect(await monitor.use((fresh) => fresh.execute('quick'))).toBe(2);
    });
  });

  it('tells everyone why there is no connection, and tries again', async () => {
    const gone = await fakeQemu({});
    await gone[Symbol.asyncDispose]();
    const monitor = new Monitor(gone.path);
    const use = () => failureOf(monitor.use((client) => client.execute('quick')));
    for (const failure of await Promise.all([use(), use()])) expect(failure.errno).toBe('ENOTCONN');
    expect((await use()).errno).toBe('ENOTCONN');
  });
});
