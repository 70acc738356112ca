import { describe, expect, it } from 'vitest';
import { isServerMessage } from '../../src/cli/server-message.ts';

describe("a serving process's message", () => {
  it.each([[{ kind: 'ready', mountpoint: '/mnt' }], [{ kind: 'failed', message: 'vm1.qcow2: in use' }]])(
    'is %o',
    (message) => {
      expect(isServerMessage(message)).toBe(true);
    },
  );

  it.each([
    [undefined],
    [null],
    ['ready'],
    [{}],
    [{ kind: 'ready' }],
    [{ kind: 'failed', message: 1 }],
    [{ kind: 'other', message: 'x' }],
  ])('is never %o', (value) => {
    expect(isServerMessage(value)).toBe(false);
  });
});
