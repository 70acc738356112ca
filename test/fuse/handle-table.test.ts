import { describe, expect, it } from 'vitest';
import type { OpenFile } from '../../src/fuse/filesystem.ts';
import { HandleTable } from '../../src/fuse/handle-table.ts';

const opened = (slot: number | undefined) => ({ slot }) as OpenFile;

describe('the table of handles', () => {
  it('gives a file of the data plane its slot as fh, others numbers from 4096', () => {
    const handles = new HandleTable();
    expect(handles.addFile(opened(7))).toBe(7);
    expect(handles.addFile(opened(undefined))).toBe(4096);
    expect(handles.addDirectory()).toBe(4097);
  });

  it.each([7, 4096, -1])('refuses slot %d if it is in use or out of range', (slot) => {
    const handles = new HandleTable();
    handles.addFile(opened(7));
    expect(() => handles.addFile(opened(slot))).toThrow(`slot ${slot}`);
  });

  it('a slot may be used again after its file was removed', () => {
    const handles = new HandleTable();
    handles.addFile(opened(7));
    handles.removeFile(7n);
    expect(handles.addFile(opened(7))).toBe(7);
  });

  it('an fh that is not open is EBADF, with all its 64 bits', () => {
    const handles = new HandleTable();
    handles.addFile(opened(7));
    for (const fh of [8n, 2n ** 32n + 7n]) {
      expect(() => handles.file(fh)).toThrow(expect.objectContaining({ errno: 'EBADF' }));
    }
    expect(() => handles.directory(7n)).toThrow(expect.objectContaining({ errno: 'EBADF' }));
  });

  it('returns all that is open, once', () => {
    const handles = new HandleTable();
    const one = opened(1);
    handles.addFile(one);
    expect(handles.removeAll()).toEqual([one]);
    expect(handles.removeAll()).toEqual([]);
  });
});
