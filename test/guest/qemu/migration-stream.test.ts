import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { runningInstead, validateStream } from '../../../src/guest/qemu/migration-stream.ts';

/** The section as QEMU 7.2 writes it: 100 bytes of room for the name of the state. */
function globalState(state: string): Buffer {
  const room = Buffer.alloc(100);
  room.write(state);
  const size = Buffer.alloc(4);
  size.writeUInt32BE(state.length + 1);
  return Buffer.concat([Buffer.from('\x04\0\0\0\x02\x0bglobalstate\0\0\0\0\0\0\0\x01', 'latin1'), size, room]);
}

const stream = (...parts: readonly Buffer[]): Buffer =>
  Buffer.concat([Buffer.from('QEVM\0\0\0\x03'), ...parts, Buffer.from('{"page_size": 4096}')]);

function patched(bytes: Buffer): Buffer {
  const change = runningInstead(bytes);
  if (change === undefined) return bytes;
  const result = Buffer.from(bytes);
  result.set(change.bytes, change.at);
  return result;
}

describe('the run state in a stream', () => {
  it('paused becomes running, and nothing else changes', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 300 }), fc.uint8Array({ maxLength: 300 }), (before, after) => {
        const [a, b] = [Buffer.from(before), Buffer.from(after)];
        expect(patched(stream(a, globalState('paused'), b))).toEqual(stream(a, globalState('running'), b));
      }),
    );
  });

  it('of several places that look like it the last one counts: the others are in the memory of the guest', () => {
    const [paused, running] = [globalState('paused'), globalState('running')];
    expect(patched(stream(paused, paused))).toEqual(stream(paused, running));
  });

  it('another state stays, and so does what is no stream at all', () => {
    for (const state of ['running', 'prelaunch', 'paused-', 'shutdown']) {
      expect(runningInstead(stream(globalState(state)))).toBeUndefined();
    }
    expect(runningInstead(globalState('paused').subarray(0, -94))).toBeUndefined();
    fc.assert(fc.property(fc.uint8Array(), (bytes) => runningInstead(bytes) === undefined));
  });
});

describe('a state file', () => {
  const check = (bytes: Uint8Array) => () =>
    validateStream({ name: 'state', bytes: bytes.length, read: (from, to) => bytes.subarray(from, to) });

  it('is whole if it begins as a stream of version 3 and ends as one, with a description or without', () => {
    expect(check(stream(globalState('paused')))).not.toThrow();
    expect(check(Buffer.from('QEVM\0\0\0\x03\x01\0'))).not.toThrow();
  });

  it.each([
    ['nothing', '', 'it has 0 bytes'],
    ['a header alone', 'QEVM\0\0\0\x03', 'it has 8 bytes'],
    ['other magic', 'QEVN\0\0\0\x03\0', 'not with QEVM'],
    ['another version', 'QEVM\0\0\0\x02\0', 'version 2'],
    ['a stream that breaks off', 'QEVM\0\0\0\x03\x04\x01', 'breaks off'],
  ])('is refused: %s', (_what, bytes, why) => {
    expect(check(Buffer.from(bytes, 'latin1'))).toThrow(why);
  });
});
