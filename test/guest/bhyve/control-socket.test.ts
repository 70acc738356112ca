import { describe, expect, it } from 'vitest';
import { errorIn } from '../../../src/guest/bhyve/control-socket.ts';
import { encodeNvlist, type NvValue } from '../../../src/guest/bhyve/nvlist.ts';

describe('the answer of a bhyve that answers', () => {
  const answer = (...entries: [string, NvValue][]): Uint8Array => encodeNvlist(new Map(entries));

  it.each([
    ['nothing', new Uint8Array(0), undefined],
    ['an empty list', answer(), undefined],
    ['a list that says something else', answer(['result', 'done']), undefined],
    ['an error', answer(['error', 'no such device']), 'no such device'],
    ['an error that is no text', answer(['error', 5n]), undefined],
    ['half a list', answer(['error', 'x']).slice(0, -1), undefined],
    ['nonsense', Buffer.from('nonsense'), undefined],
  ])('%s', (_what, bytes, error) => {
    expect(errorIn(bytes)).toBe(error);
  });
});
