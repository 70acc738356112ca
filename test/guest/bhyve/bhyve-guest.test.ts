/** The guest interface against the stand-in, without a mount: state goes to a plain folder. */
import { mkdir, readdir, readFile, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { FsError } from '../../../src/errors.ts';
import { bhyveGuestExists, openBhyveGuest } from '../../../src/guest/bhyve/bhyve-guest.ts';
import type { Guest, SaveTarget } from '../../../src/guest/guest.ts';
import { withDirectory } from '../../e2e/run.ts';
import {
  type BhyveHost,
  type Generation,
  type HostOptions,
  installBhyve,
  OSRELDATES,
  type RunningGuest,
  withGuest,
} from '../../stand-in/bhyve.ts';

interface Scene {
  readonly host: BhyveHost;
  readonly running: RunningGuest;
  readonly guest: Guest;
  readonly directory: string;
  /** Where the guest would put what it was not told to put elsewhere. */
  readonly cwd: string;
  readonly target: (change?: Partial<SaveTarget>) => SaveTarget;
}

let serial = 0;

/** A running guest of its own name, on a host as wished. */
async function scene(options: HostOptions, body: (scene: Scene) => Promise<void>): Promise<void> {
  await withDirectory(async (root) => {
    const host = await installBhyve(root, options);
    for (const [key, value] of Object.entries(host.env)) vi.stubEnv(key, value);
    serial += 1;
    const name = `unit${process.pid}-${serial}`;
    const disk = join(root, 'disk.raw');
    await writeFile(disk, Buffer.alloc(256 * 4096));
    const directory = join(root, 'incoming');
    const cwd = join(root, 'cwd');
    await mkdir(directory);
    await mkdir(cwd);
    await withGuest(host, name, { disks: [disk], cwd, delayUs: 1000 }, async (running) => {
      const guest = openBhyveGuest({ name, runDirectory: host.runDirectory });
      const target = (change: Partial<SaveTarget> = {}): SaveTarget => ({
        directory,
        name: 'state',
        suspend: false,
        keep: async () => {},
        // In a plain folder no one sees files being closed: the guest tells.
        closed: running.line('saved').then(
          () => {},
          () => new Promise(() => {}),
        ),
        signal: new AbortController().signal,
        ...change,
      });
      await body({ host, running, guest, directory, cwd, target });
      expect(running.lines()).not.toContain('empty connection');
    });
  });
}

afterEach(() => vi.unstubAllEnvs());

async function validate(guest: Guest, directory: string): Promise<void> {
  const files = await Promise.all(
    ['state', 'state.kern', 'state.meta'].map(async (name) => {
      const content = await readFile(join(directory, name));
      return { name, bytes: content.length, read: () => content };
    }),
  );
  guest.validate(files);
}

const never = new Promise<void>(() => {});

const generations: Generation[] = ['A', 'B', 'C', 'D', 'E'];

describe.each(generations)('generation %s', (generation) => {
  it('saves through its socket, on a host that says its release', async () => {
    await scene(
      { generation, osreldate: OSRELDATES[generation] },
      async ({ guest, directory, cwd, target, running }) => {
        expect(await guest.status()).toEqual({ alive: true, state: 'running' });
        await guest.save(target(generation === 'B' ? {} : { closed: never }));
        await validate(guest, directory);
        expect(await readdir(cwd)).toEqual([]);
        await running.line('saved');
      },
    );
  });

  it('saves through its socket, on a host that does not', async () => {
    await scene({ generation }, async ({ guest, directory, cwd, target }) => {
      await guest.save(target());
      await validate(guest, directory);
      expect(await readdir(cwd)).toEqual([]);
    });
  });

  it('saves by bhyvectl, with the documented arguments', async () => {
    await scene({ generation, bhyvectl: true }, async ({ guest, directory, target, host }) => {
      await guest.save(target());
      await validate(guest, directory);
      expect(await host.bhyvectlCalls()).toEqual([
        `--vm=${guest.name} --rundir=${host.runDirectory} --checkpoint=${directory}/state`,
      ]);
    });
  });

  it.each([false, true])('suspends; by bhyvectl: %s', async (bhyvectl) => {
    await scene({ generation, bhyvectl }, async ({ guest, directory, target, running }) => {
      const closed = running.line('suspended').then(() => {});
      await guest.save(target({ suspend: true, closed }));
      await validate(guest, directory);
      expect(await running.ended).toBe(0);
      expect(await guest.status()).toEqual({ alive: false, state: 'off' });
    });
  });

  it('ends in the middle, which is noticed', async () => {
    await scene({ generation }, async ({ guest, target, running }) => {
      await running.setFault('die 8');
      const error = await guest.save(target({ closed: never })).catch((reason: unknown) => reason);
      expect(error).toBeInstanceOf(FsError);
      expect(error).toMatchObject({ errno: 'EIO', message: expect.stringContaining('ended while it saved') });
      expect(await guest.status()).toEqual({ alive: false, state: 'off' });
      expect((await stat(join(target().directory, 'state'))).size).toBe(1 << 20);
    });
  });

  it('hangs, and is waited for until the caller gives up', async () => {
    await scene({ generation }, async ({ guest, target, running }) => {
      await running.setFault('hang 7');
      const giveUp = new AbortController();
      const saved = guest.save(target({ closed: never, signal: giveUp.signal }));
      await running.line('saving');
      giveUp.abort(new FsError('ETIMEDOUT', 'too slow'));
      await expect(saved).rejects.toMatchObject({ errno: 'ETIMEDOUT', message: 'too slow' });
      // Its socket is open still, and no second request is let in behind the first.
      expect((await guest.status()).alive).toBe(true);
    });
  });
});

describe('a bhyve guest', () => {
  it('that cannot save a device leaves files that do not fit together', async () => {
    await scene({ generation: 'D' }, async ({ guest, directory, target, running }) => {
      await running.setFault('unsavable');
      await guest.save(target({ closed: never }));
      await expect(validate(guest, directory)).rejects.toMatchObject({ errno: 'EIO' });
    });
  });

  it('of the newest generation says why', async () => {
    await scene({ generation: 'E' }, async ({ guest, target, running }) => {
      await running.setFault('unsavable');
      await expect(guest.save(target({ closed: never }))).rejects.toMatchObject({
        errno: 'EIO',
        message: expect.stringContaining('not supported'),
      });
    });
  });

  it('built without snapshots says so', async () => {
    await scene({ generation: 'none' }, async ({ guest, target }) => {
      expect(await guest.status()).toEqual({ alive: true, state: 'running' });
      await expect(guest.save(target())).rejects.toMatchObject({
        errno: 'ENOTSUP',
        message: expect.stringContaining('--no-memory'),
      });
    });
  });

  it('suspending is not given up because someone is impatient', async () => {
    await scene({ generation: 'D' }, async ({ guest, directory, target, running }) => {
      const giveUp = new AbortController();
      const closed = running.line('suspended').then(() => {});
      const saved = guest.save(target({ suspend: true, closed, signal: giveUp.signal }));
      await running.line('saving');
      giveUp.abort(new FsError('EINTR', 'interrupted'));
      await saved;
      await validate(guest, directory);
    });
  });

  it('that was killed leaves a socket behind, and is off', async () => {
    await scene({ generation: 'D' }, async ({ guest, target, running, host }) => {
      expect(await bhyveGuestExists({ name: guest.name, runDirectory: host.runDirectory })).toBe(true);
      running.kill();
      await running.ended;
      expect((await stat(join(host.runDirectory, guest.name))).isSocket()).toBe(true);
      expect(await guest.status()).toEqual({ alive: false, state: 'off' });
      expect(await bhyveGuestExists({ name: guest.name, runDirectory: host.runDirectory })).toBe(false);
      await expect(guest.save(target())).rejects.toMatchObject({ errno: 'ENOTCONN' });
    });
  });

  it('is saved once at a time', async () => {
    await scene({ generation: 'D' }, async ({ guest, target }) => {
      const first = guest.save(target());
      await expect(guest.save(target())).rejects.toMatchObject({ errno: 'EBUSY' });
      await first;
    });
  });

  it('is controlled by bhyvectl, word for word', async () => {
    await scene({ bhyvectl: true }, async ({ guest, host }) => {
      expect(await guest.stats()).toContain('vm exits');
      await guest.nmi();
      await guest.reset();
      await guest.poweroff();
      await guest.forward(' --get-stats  --inject-nmi ');
      const words = ['--get-stats', '--inject-nmi', '--force-reset', '--force-poweroff', '--get-stats --inject-nmi'];
      expect(await host.bhyvectlCalls()).toEqual(
        words.map((line) => `--vm=${guest.name} --rundir=${host.runDirectory} ${line}`),
      );
      await expect(guest.forward('--fly')).rejects.toMatchObject({ errno: 'ENOTSUP' });
      await expect(guest.forward('  ')).rejects.toMatchObject({ errno: 'EINVAL' });
    });
  });

  it('has no pause', async () => {
    await scene({}, async ({ guest }) => {
      await expect(guest.pause()).rejects.toMatchObject({ errno: 'ENOTSUP' });
      await expect(guest.resume()).rejects.toMatchObject({ errno: 'ENOTSUP' });
      await expect(guest.stats()).rejects.toMatchObject({
        errno: 'ENOTSUP',
        message: expect.stringContaining('bhyvectl is not installed'),
      });
    });
  });

  it('knows which bhyve it is', async () => {
    await scene({ osreldate: 1_401_000 }, async ({ guest }) => {
      const identity = await guest.identity();
      expect(identity).toMatchObject({ kind: 'bhyve', name: guest.name, hostRelease: '1401000' });
      expect(identity.version).toMatch(/, bhyve [0-9a-f]{16}$/);
    });
  });
});

it.each(['', 'a/b', 'a\0b'])('no guest can be called %j', (name) => {
  expect(() => openBhyveGuest({ name })).toThrow(FsError);
});
