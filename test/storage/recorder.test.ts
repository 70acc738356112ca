import { describe, expect, it } from 'vitest';
import { MemoryStorage } from './memory-storage.ts';
import { type CrashOptions, crashImages, Died, Recorder } from './recorder.ts';
import { storageContract } from './storage-contract.ts';

storageContract('Recorder', (action) => action(new Recorder(new MemoryStorage())));

const put = (storage: Recorder, position: number, ...bytes: number[]) =>
  storage.write(Uint8Array.from(bytes), 0, bytes.length, position);

describe('the recorder', () => {
  it('keeps each change that succeeded, with its own copy of the bytes', () => {
    const recorder = new Recorder(new MemoryStorage());
    const bytes = Uint8Array.of(1, 2);
    recorder.write(bytes, 0, 2, 5);
    bytes.fill(9);
    recorder.flush();
    recorder.truncate(3);
    recorder.mark('done');
    recorder.punch(0, 1);
    expect(recorder.operations).toEqual([
      { kind: 'write', position: 5, bytes: Uint8Array.of(1, 2) },
      { kind: 'flush' },
      { kind: 'truncate', size: 3 },
      { kind: 'mark', label: 'done' },
      { kind: 'punch', position: 0, length: 1 },
    ]);
    expect(recorder.changes).toBe(4);
  });

  it('a punch that the file system cannot do is no change', () => {
    const recorder = new Recorder(new MemoryStorage({ punches: false }));
    expect(recorder.punch(0, 1)).toBe(false);
    expect(recorder.operations).toEqual([]);
  });

  it('fails at the change it is told to, once or several times, then works again', () => {
    const recorder = new Recorder(new MemoryStorage());
    put(recorder, 0, 1);
    recorder.fail({ at: 1, how: 'ENOSPC', times: 2 });
    put(recorder, 0, 2);
    expect(() => put(recorder, 0, 3)).toThrow(expect.objectContaining({ errno: 'ENOSPC' }));
    expect(() => recorder.flush()).toThrow(expect.objectContaining({ errno: 'ENOSPC' }));
    put(recorder, 1, 4);
    expect(recorder.operations).toHaveLength(3);
    const target = new Uint8Array(2);
    recorder.read(target, 0, 2, 0);
    expect([...target]).toEqual([2, 4]);
  });

  it('a failing write may have written a part', () => {
    const inner = new MemoryStorage();
    const recorder = new Recorder(inner);
    recorder.fail({ at: 0, how: 'EIO', partialBytes: 2 });
    expect(() => put(recorder, 0, 1, 2, 3)).toThrow(expect.objectContaining({ errno: 'EIO' }));
    expect([...inner.bytes()]).toEqual([1, 2]);
    expect(recorder.operations).toEqual([{ kind: 'write', position: 0, bytes: Uint8Array.of(1, 2) }]);
  });

  it('reads fail on their own count', () => {
    const recorder = new Recorder(new MemoryStorage());
    recorder.fail({ at: 1, how: 'EIO', of: 'reads' });
    put(recorder, 0, 1);
    recorder.read(new Uint8Array(1), 0, 1, 0);
    expect(() => recorder.read(new Uint8Array(1), 0, 1, 0)).toThrow(expect.objectContaining({ errno: 'EIO' }));
  });

  it('after death nothing works any more', () => {
    const recorder = new Recorder(new MemoryStorage());
    recorder.fail({ at: 0, how: 'death' });
    expect(() => recorder.flush()).toThrow(Died);
    recorder.fail(undefined);
    expect(() => put(recorder, 0, 1)).toThrow(Died);
    expect(() => recorder.read(new Uint8Array(1), 0, 1, 0)).toThrow(Died);
    expect(() => recorder.size()).toThrow(Died);
  });
});

describe('crash images', () => {
  /** Contents of each image after what `script` does to a file of `before`, in order, without repetitions. */
  function contents(before: number[], script: (recorder: Recorder) => void, options?: CrashOptions): string[] {
    const start = MemoryStorage.from(Uint8Array.from(before));
    const recorder = new Recorder(start.copy());
    script(recorder);
    return [
      ...new Set([...crashImages(start, recorder.operations, options)].map(({ file }) => file.bytes().join(' '))),
    ];
  }

  it('of a process that dies are the prefixes', () => {
    const script = (file: Recorder) => {
      put(file, 0, 1);
      put(file, 1, 2);
      file.flush();
      file.truncate(1);
    };
    expect(contents([0, 0], script, { kind: 'process' })).toEqual(['0 0', '1 0', '1 2', '1']);
  });

  it('of a power failure have any subset of what was not flushed', () => {
    const script = (file: Recorder) => {
      put(file, 0, 1);
      put(file, 1, 2);
      put(file, 2, 3);
    };
    expect(contents([0, 0, 0], script).sort()).toEqual([
      '0 0 0',
      '0 0 3',
      '0 2 0',
      '0 2 3',
      '1 0 0',
      '1 0 3',
      '1 2 0',
      '1 2 3',
    ]);
  });

  it('never lack what a flush made durable', () => {
    const script = (file: Recorder) => {
      put(file, 0, 1);
      file.flush();
      put(file, 1, 2);
      file.flush();
      put(file, 2, 3);
    };
    expect(contents([0, 0, 0], script)).toEqual(['0 0 0', '1 0 0', '1 2 0', '1 2 3']);
  });

  it('with too many to try all: none, each alone, all but each, and the same random ones each time', () => {
    const script = (file: Recorder) => {
      for (let index = 0; index < 8; index++) put(file, index, 1);
    };
    const before = new Array<number>(8).fill(0);
    const images = contents(before, script, { exhaustive: 2 });
    const ones = (image: string) => image.split(' ').filter((byte) => byte === '1').length;
    expect(images.filter((image) => image.endsWith('1') && ones(image) === 7)).toHaveLength(7);
    expect(images).toContain('0 0 0 0 0 0 0 1');
    expect(images).toContain('1 1 1 1 1 1 1 1');
    expect(images.length).toBeLessThan(2 ** 8);
    expect(contents(before, script, { exhaustive: 2 })).toEqual(images);
  });

  it('have writes torn between sectors', () => {
    const start = MemoryStorage.from(new Uint8Array(1536));
    const recorder = new Recorder(start.copy());
    recorder.write(new Uint8Array(1024).fill(1), 0, 1024, 256);
    const ends = [...crashImages(start, recorder.operations)].map(({ file }) => {
      const bytes = file.bytes();
      return [bytes.indexOf(1), bytes.lastIndexOf(1)];
    });
    expect(ends).toEqual([
      [-1, -1],
      [256, 1279],
      [256, 511],
      [256, 1023],
      [1024, 1279],
    ]);
  });

  it('know which marks were passed, and a mark is looked at with everything since the flush lost', () => {
    const start = new MemoryStorage();
    const recorder = new Recorder(start.copy());
    put(recorder, 0, 1);
    recorder.mark('written');
    recorder.flush();
    recorder.mark('flushed');
    const filesAfter = (mark: string) =>
      [...crashImages(start, recorder.operations)]
        .filter(({ marks }) => marks.includes(mark))
        .map(({ file }) => file.bytes().join(' '));
    expect(filesAfter('written')).toContain('');
    expect(new Set(filesAfter('flushed'))).toEqual(new Set(['1']));
  });

  it('say in their label which crash it was', () => {
    const recorder = new Recorder(new MemoryStorage());
    put(recorder, 16, 1);
    put(recorder, 0, 2);
    const labels = [...crashImages(new MemoryStorage(), recorder.operations)].map(({ label }) => label);
    expect(labels).toEqual([
      'before the first operation',
      'after operation 0 of 2 (write of 1 bytes at 0x10)',
      'after operation 1 of 2 (write of 1 bytes at 0x0)',
      'after operation 1 of 2 (write of 1 bytes at 0x0), lost: 0',
    ]);
  });

  it('belong to whoever gets them', () => {
    const recorder = new Recorder(new MemoryStorage());
    put(recorder, 0, 1);
    recorder.flush();
    for (const { file } of crashImages(new MemoryStorage(), recorder.operations)) file.truncate(100);
    for (const { file } of crashImages(new MemoryStorage(), recorder.operations)) {
      expect(file.size()).toBeLessThan(100);
      file.write(Uint8Array.of(7), 0, 1, 0);
    }
  });
});
