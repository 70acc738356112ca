import { describe, expect, it } from 'vitest';
import { freezeByAgent } from '../../../src/guest/qemu/guest-agent.ts';
import { type Answer, failureOf, fakeQemu, Refusal } from './fake-qemu.ts';

const sync: Answer = ({ id }, connection) => {
  connection.write('{"return": "to someone before us"}\n\xff', 'latin1');
  return id;
};

const agent = (answers: Readonly<Record<string, Answer>>) =>
  fakeQemu({ 'guest-sync-delimited': sync, ...answers }, { greet: () => {} });

const asked = (commands: readonly (readonly [string, unknown])[]) =>
  commands.map(([command]) => command).filter((command) => command !== 'guest-sync-delimited');

describe('freezing the file systems of a guest', () => {
  it('until they are thawed', async () => {
    await using guest = await agent({ 'guest-fsfreeze-freeze': () => 2, 'guest-fsfreeze-thaw': () => 2 });
    const frozen = await freezeByAgent(guest.path);
    expect(asked(guest.commands)).toEqual(['guest-fsfreeze-freeze']);
    await frozen?.thaw();
    expect(asked(guest.commands)).toEqual(['guest-fsfreeze-freeze', 'guest-fsfreeze-thaw']);
    await expect.poll(() => guest.connections.open).toBe(0);
  });

  it('nobody there, or nobody who answers: nothing is frozen, and nothing else is asked', async () => {
    await using silent = await fakeQemu({ 'guest-sync-delimited': () => new Promise(() => {}) }, { greet: () => {} });
    expect(await freezeByAgent(silent.path)).toBeUndefined();
    expect(asked(silent.commands)).toEqual([]);
    expect(await freezeByAgent(`${silent.path}.none`)).toBeUndefined();
  });

  it.each([
    [
      'refuses',
      () => {
        throw new Refusal('No space');
      },
    ],
    ['breaks off', (_: unknown, connection: { destroy(): void }) => connection.destroy()],
  ])('an agent that %s is asked to thaw what it may have frozen', async (_how, freeze) => {
    await using guest = await agent({ 'guest-fsfreeze-freeze': freeze as Answer, 'guest-fsfreeze-thaw': () => 1 });
    expect(await freezeByAgent(guest.path)).toBeUndefined();
    expect(asked(guest.commands)).toEqual(['guest-fsfreeze-freeze', 'guest-fsfreeze-thaw']);
  });

  it('no file system to freeze is not frozen', async () => {
    await using guest = await agent({ 'guest-fsfreeze-freeze': () => 0 });
    expect(await freezeByAgent(guest.path)).toBeUndefined();
  });

  it('thawing is tried again, and a failure says what to do', async () => {
    let attempts = 0;
    const thaw: Answer = (_, connection) => {
      attempts++;
      if (attempts < 3) connection.destroy();
      return 1;
    };
    await using guest = await agent({ 'guest-fsfreeze-freeze': () => 1, 'guest-fsfreeze-thaw': thaw });
    await (await freezeByAgent(guest.path))?.thaw();
    expect(attempts).toBe(3);

    const frozen = await freezeByAgent(guest.path);
    attempts = -10;
    const failure = await failureOf(frozen?.thaw() ?? Promise.resolve());
    expect(failure.errno).toBe('EIO');
    expect(failure.message).toContain('fsfreeze -u');
  });
});
