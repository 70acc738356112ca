import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { FsError } from '../../../src/errors.ts';
import { QemuGuest } from '../../../src/guest/qemu/qemu-guest.ts';
import { type Answer, type FakeQemu, failureOf, fakeQemu, Refusal } from './fake-qemu.ts';

type Answers = Record<string, Answer>;

/** The run state follows stop and cont; a migration is over at once. */
function machine(changes: Answers = {}, before = 'running', version: readonly [number, number, number] = [7, 2, 0]) {
  let status = before;
  let migration: object = {};
  const set = (state: string) => () => {
    status = state;
    return {};
  };
  const answers: Answers = {
    'query-status': () => ({ status, running: status === 'running' }),
    'query-name': () => ({ name: 'vm1' }),
    'query-migrate-capabilities': () => [
      { capability: 'multifd', state: true },
      { capability: 'events', state: true },
      { capability: 'xbzrle', state: false },
    ],
    'query-migrate-parameters': () => ({ 'max-bandwidth': 1000, 'tls-creds': '' }),
    'migrate-set-capabilities': () => ({}),
    'migrate-set-parameters': () => ({}),
    getfd: () => ({}),
    closefd: () => ({}),
    'add-fd': () => ({}),
    'remove-fd': () => ({}),
    stop: set('paused'),
    cont: set('running'),
    migrate: () => {
      migration = { status: 'completed' };
      return {};
    },
    'query-migrate': () => migration,
    quit: (_, connection) => void connection.destroy(),
    ...changes,
  };
  return fakeQemu(answers, { version });
}

/** A migration that writes the section which tells the run state, into the file that the guest was saved to. */
function withState(): Answers {
  const paused = Buffer.from(`\x0bglobalstate\0\0\0\0\0\0\0\x01\0\0\0\x07paused\0${'\0'.repeat(93)}`, 'latin1');
  let asked = 0;
  return {
    migrate: (_, _connection, folder) => {
      writeFileSync(join(folder, 'state'), paused);
      return {};
    },
    'query-migrate': () => (asked++ === 0 ? {} : { status: 'completed' }),
  };
}

const stateOf = ({ folder }: FakeQemu) => readFileSync(join(folder, 'state'), 'latin1');

const guestOf = ({ path }: FakeQemu) => new QemuGuest({ socketPath: path });

const save = (
  qemu: FakeQemu,
  { suspend = false, keep = async () => {}, signal = new AbortController().signal } = {},
) => {
  const closed = new Promise<void>(() => {});
  return guestOf(qemu).save({ directory: qemu.folder, name: 'state', suspend, closed, keep, signal });
};

const names = ({ commands }: FakeQemu) => commands.map(([name]) => name).filter((name) => !name.startsWith('query'));

const SETTING = ['migrate-set-capabilities', 'migrate-set-parameters'];
const RESTORING = ['migrate-set-parameters', 'migrate-set-capabilities'];

describe('saving a QEMU guest', () => {
  it('stops it, writes its state at full speed with plain settings, puts them back and lets it run', async () => {
    await using qemu = await machine();
    await save(qemu);
    expect(names(qemu)).toEqual(['stop', ...SETTING, 'getfd', 'migrate', ...RESTORING, 'cont']);
    const [off, on] = qemu.commands.filter(([name]) => name === 'migrate-set-capabilities').map(([, args]) => args);
    expect(off).toEqual({ capabilities: [{ capability: 'multifd', state: false }] });
    expect(on).toEqual({ capabilities: [{ capability: 'multifd', state: true }] });
    const bandwidths = qemu.commands.filter(([name]) => name === 'migrate-set-parameters').map(([, args]) => args);
    expect(bandwidths).toEqual([
      { 'max-bandwidth': 2 ** 50, 'tls-creds': '' },
      { 'max-bandwidth': 1000, 'tls-creds': '' },
    ]);
  });

  it('a newer QEMU takes the file as a descriptor set', async () => {
    await using qemu = await machine({}, 'running', [9, 1, 0]);
    await save(qemu);
    expect(names(qemu)).toEqual(['stop', ...SETTING, 'add-fd', 'migrate', 'remove-fd', ...RESTORING, 'cont']);
    const [, args] = qemu.commands.find(([name]) => name === 'migrate') ?? [];
    expect(args?.uri).toMatch(/^file:\/dev\/fdset\/\d+$/);
  });

  it.each([false, true])('the state says that the guest runs; to suspend it: %s', async (suspend) => {
    await using qemu = await machine(withState());
    await save(qemu, { suspend });
    expect(stateOf(qemu)).toContain('\0\0\0\x08running\0');
  });

  it('one that was paused stays paused, also in its state', async () => {
    await using qemu = await machine(withState(), 'paused');
    await save(qemu);
    expect(names(qemu)).not.toContain('stop');
    expect(names(qemu)).not.toContain('cont');
    expect(stateOf(qemu)).toContain('\0\0\0\x07paused\0');
  });

  it('to suspend it QEMU ends instead, when its state is kept', async () => {
    await using qemu = await machine();
    const before: string[][] = [];
    await save(qemu, { suspend: true, keep: async () => void before.push(names(qemu).slice(-1)) });
    expect(before).toEqual([RESTORING.slice(-1)]);
    expect(names(qemu).slice(-1)).toEqual(['quit']);
  });

  it('one whose state cannot be kept runs on instead of ending', async () => {
    await using qemu = await machine();
    const keep = async () => {
      throw new FsError('ENOSPC', 'the host disk is full');
    };
    expect((await failureOf(save(qemu, { suspend: true, keep }))).errno).toBe('ENOSPC');
    expect(names(qemu).slice(-1)).toEqual(['cont']);
  });

  it.each([
    ['says why', { status: 'failed', 'error-desc': 'No such luck.' }, 'EIO', 'No such luck.'],
    ['says nothing', { status: 'failed' }, 'EIO', 'failed.'],
    ['was cancelled by someone else', { status: 'cancelled' }, 'EIO', 'cancelled.'],
    ['is out of space', { status: 'failed', 'error-desc': 'x: No space left on device' }, 'ENOSPC', 'No space'],
  ])('a migration that fails and %s: the guest runs on', async (_how, outcome, errno, words) => {
    let asked = 0;
    await using qemu = await machine({ 'query-migrate': () => (asked++ === 0 ? {} : outcome) });
    const failure = await failureOf(save(qemu));
    expect(failure.errno).toBe(errno);
    expect(failure.message).toContain(words);
    expect(names(qemu).slice(-1)).toEqual(['cont']);
  });

  it('a device that cannot be saved: the guest runs on, nothing stays in QEMU', async () => {
    await using qemu = await machine({
      migrate: () => {
        throw new Refusal("State blocked by non-migratable device '0000:00:03.0/nvme'");
      },
    });
    expect(await failureOf(save(qemu))).toMatchObject({ errno: 'EIO', message: expect.stringContaining('nvme') });
    expect(names(qemu).slice(-4)).toEqual(['closefd', ...RESTORING, 'cont']);
  });

  it('given up by its caller: QEMU gives up, and the guest runs on', async () => {
    const giveUp = new AbortController();
    let status = 'none';
    await using qemu = await machine({
      migrate: () => {
        status = 'active';
        setTimeout(() => giveUp.abort(new FsError('ETIMEDOUT', 'too long')), 20);
        return {};
      },
      'query-migrate': () => ({ status }),
      migrate_cancel: () => {
        status = 'cancelled';
        return {};
      },
    });
    expect(await failureOf(save(qemu, { signal: giveUp.signal }))).toMatchObject({ errno: 'ETIMEDOUT' });
    expect(names(qemu).slice(-4)).toEqual(['migrate_cancel', ...RESTORING, 'cont']);
  });

  it('QEMU dies: EIO, at once', async () => {
    await using qemu = await machine({
      migrate: (_, connection) => void setTimeout(() => connection.destroy(), 10),
    });
    expect((await failureOf(save(qemu))).errno).toBe('EIO');
  });

  it.each([
    ['postmigrate', 'resume it first'],
    ['inmigrate', 'being restored'],
    ['suspended', 'wake it'],
    ['internal-error', 'internal error'],
    ['shutdown', 'shut down'],
  ])('in the state %s it is refused, and untouched', async (state, words) => {
    await using qemu = await machine({}, state);
    expect((await failureOf(save(qemu))).message).toContain(words);
    expect(names(qemu)).toEqual([]);
  });

  it('while QEMU migrates it to another host it is refused', async () => {
    await using qemu = await machine({ 'query-migrate': () => ({ status: 'active' }) });
    expect(await failureOf(save(qemu))).toMatchObject({ errno: 'EBUSY' });
    expect(names(qemu)).toEqual([]);
  });
});

describe('a QEMU guest', () => {
  it.each([
    ['running', 'running'],
    ['prelaunch', 'paused'],
    ['io-error', 'paused'],
    ['shutdown', 'off'],
    ['constructor', 'unknown'],
  ])('status %s is called %s', async (said, state) => {
    await using qemu = await machine({}, said);
    const guest = guestOf(qemu);
    expect(guest.name).toBe('qmp');
    expect(await guest.status()).toEqual({ alive: true, state });
    expect(guest.name).toBe('vm1');
  });

  it('that is not there is off; one that talks nonsense is there', async () => {
    const gone = await machine();
    await gone[Symbol.asyncDispose]();
    expect(await guestOf(gone).status()).toEqual({ alive: false, state: 'off' });
    await using odd = await fakeQemu({}, { greet: (connection) => void connection.write('hello\n') });
    expect(await guestOf(odd).status()).toEqual({ alive: true, state: 'unknown' });
  });

  it('takes one QMP command as JSON, and nothing else', async () => {
    await using qemu = await machine({ echo: (args) => args });
    const guest = guestOf(qemu);
    expect(await guest.forward('{"execute": "echo", "arguments": {"a": [1]}}')).toBe('{"a":[1]}');
    for (const words of ['echo', '7', '{}', '{"execute": 1}', '{"execute": "echo", "arguments": 3}']) {
      expect(await failureOf(guest.forward(words))).toMatchObject({ errno: 'EINVAL' });
    }
    expect(await failureOf(guest.nmi())).toMatchObject({ errno: 'ENOTSUP' });
  });

  it('without an agent its file systems are not frozen, and that is no failure', async () => {
    await using qemu = await machine({
      'qom-list': () => [{ name: 'a', type: 'child<virtserialport>' }],
      'qom-get': () => 'some.other.port',
    });
    expect(await guestOf(qemu).freezeFileSystems()).toBeUndefined();
    await using nothing = await machine();
    expect(await guestOf(nothing).freezeFileSystems()).toBeUndefined();
    await using paused = await machine({}, 'paused');
    expect(await guestOf(paused).freezeFileSystems()).toBeUndefined();
  });

  it('has the agent at the socket of the port of that name, if QEMU listens there', async () => {
    await using agent = await fakeQemu(
      { 'guest-sync-delimited': ({ id }) => id, 'guest-fsfreeze-freeze': () => 1, 'guest-fsfreeze-thaw': () => 1 },
      { greet: () => {} },
    );
    const withPort = (ending: string) =>
      machine({
        'qom-list': ({ path }) =>
          path === '/machine/peripheral-anon'
            ? [
                { name: 'device[0]', type: 'child<virtio-serial-pci>' },
                { name: 'device[1]', type: 'child<virtserialport>' },
              ]
            : [],
        'qom-get': ({ property }) => (property === 'name' ? 'org.qemu.guest_agent.0' : 'chr1'),
        'query-chardev': () => [
          { label: 'chr0', filename: 'unix:/tmp/wrong,server=on' },
          { label: 'chr1', filename: `disconnected:unix:${agent.path}${ending}` },
        ],
      });
    await using client = await withPort('');
    expect(await guestOf(client).freezeFileSystems()).toBeUndefined();
    expect(agent.commands).toEqual([]);
    await using qemu = await withPort(',server=on');
    await (await guestOf(qemu).freezeFileSystems())?.thaw();
    expect(agent.commands.map(([name]) => name)).toContain('guest-fsfreeze-thaw');
  });

  it('warns of a program that is another one than saved the state, or is not there', async () => {
    const warningsFor = async (program: string) => {
      const saved = { kind: 'qemu', name: 'a', version: '0.0.1', hostRelease: undefined, argv: [program] } as const;
      const request = { statePath: '/s', shortStatePath: '/s', diskPath: '/a/disk.raw', saved };
      return (await new QemuGuest({ socketPath: '/none' }).restoreCommand(request)).warnings;
    };
    expect((await warningsFor('qemu-img'))[0]).toContain('saved by QEMU 0.0.1');
    expect((await warningsFor('/no/such/qemu'))[0]).toContain('cannot be run here');
  });
});
