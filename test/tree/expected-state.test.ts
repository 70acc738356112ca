import { describe, expect, it } from 'vitest';
import type { Checkpoint } from '../../src/disk/disk.ts';
import { expectedStateBytes } from '../../src/tree/expected-state.ts';

const checkpoint = (bytes?: number) =>
  ({ stateFiles: bytes === undefined ? [] : [{ name: 'state', bytes }] }) as unknown as Checkpoint;

describe('the state to come', () => {
  it('is as much as last time', () => {
    expect(expectedStateBytes([checkpoint(5), checkpoint(7), checkpoint()], ['bhyve', '-m', '1G'])).toBe(7);
  });

  it.each([
    [['bhyve', '-c', '2', '-m', '512M', 'vm'], 512 * 2 ** 20],
    [['qemu', '-m', '64'], 64 * 2 ** 20],
    [['qemu', '-m', 'size=2G,slots=3'], 2 ** 31],
    [['bhyve', 'vm'], undefined],
    [['bhyve', '-m'], undefined],
    [[], undefined],
  ])('is the memory in %j', (argv, bytes) => {
    expect(expectedStateBytes([checkpoint()], argv)).toBe(bytes);
  });
});
