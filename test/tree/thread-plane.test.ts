import { afterEach, describe, expect, it } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { DATA_HANDLES, DEFER } from '../../src/fuse/data-plane.ts';
import { errnoNumber } from '../../src/os/errno.ts';
import { DataThreads, SharedOpening } from '../../src/tree/data-threads.ts';
import { ThreadPlane } from '../../src/tree/thread-plane.ts';
import { attachFake, FakeDisk } from './fake-disk.ts';

const opened: DataThreads[] = [];
afterEach(() => {
  for (const threads of opened.splice(0)) threads.close();
});

function fixture() {
  const disk = new FakeDisk({ bytes: 8192 });
  const threads = new DataThreads();
  opened.push(threads);
  const reported: string[] = [];
  const opening = new SharedOpening(
    () => disk.openLive(),
    threads,
    (error) => reported.push(error.message),
  );
  const plane = () => new ThreadPlane(threads.attach().plane, attachFake);
  const slotOf = (base: number, length: number, writable = true): number => {
    const { shared } = opening.acquire();
    return threads.takeSlot({ contentsId: shared.id, base, length, writable }) as number;
  };
  return { disk, threads, reported, opening, plane, slotOf };
}

const bytes = (text: string): Uint8Array => Buffer.from(text);

describe('a data thread', () => {
  it('serves a file that was opened after it had started', () => {
    const { plane, slotOf, disk } = fixture();
    const thread = plane();
    const slot = slotOf(0, Number.POSITIVE_INFINITY);
    expect(thread.write(slot, 10, 3, bytes('xabcx'), 1, false)).toBe(3);
    expect(disk.live.pages.get(0)?.subarray(10, 13)).toEqual(Uint8Array.from(bytes('abc')));
    const reply = new Uint8Array(6);
    expect(thread.read(slot, 10, 3, reply, 2)).toBe(3);
    expect(Buffer.from(reply).toString('latin1')).toBe('\0\0abc\0');
  });

  it('serves a file that was open before it started', () => {
    const { plane, slotOf } = fixture();
    const slot = slotOf(0, Number.POSITIVE_INFINITY);
    expect(plane().read(slot, 8190, 10, new Uint8Array(10), 0)).toBe(2);
  });

  it('shows a partition from its own start to its own end', () => {
    const { plane, slotOf, disk } = fixture();
    const slot = slotOf(4096, 512);
    const thread = plane();
    expect(thread.write(slot, 510, 4, bytes('abcd'), 0, false)).toBe(2);
    expect(disk.live.pages.get(1)?.[511]).toBe('b'.charCodeAt(0));
    expect(disk.live.pages.get(1)?.[512]).toBe(0);
    expect(thread.write(slot, 512, 1, bytes('x'), 0, false)).toBe(-errnoNumber('ENOSPC'));
    expect(thread.read(slot, 512, 10, new Uint8Array(10), 0)).toBe(0);
  });

  it('follows the size of the disk where the file is the whole disk', () => {
    const { plane, slotOf, disk } = fixture();
    const slot = slotOf(0, Number.POSITIVE_INFINITY);
    const thread = plane();
    disk.live.bytes = 12_288;
    expect(thread.read(slot, 8192, 8192, new Uint8Array(8192), 0)).toBe(4096);
  });

  it('leaves to the main thread what is no slot, not in use, or not writable', () => {
    const { plane, slotOf, threads } = fixture();
    const thread = plane();
    const slot = slotOf(0, 512, false);
    expect(thread.read(DATA_HANDLES, 0, 1, new Uint8Array(1), 0)).toBe(DEFER);
    expect(thread.read(slot + 1, 0, 1, new Uint8Array(1), 0)).toBe(DEFER);
    expect(thread.write(slot, 0, 1, bytes('x'), 0, false)).toBe(DEFER);
    expect(thread.allocate(slot, 0, 1, 3)).toBe(DEFER);
    expect(thread.flush(slot)).toBe(0);
    threads.freeSlot(slot);
    expect(thread.read(slot, 0, 1, new Uint8Array(1), 0)).toBe(DEFER);
    expect(thread.flush(slot)).toBe(DEFER);
  });

  it('defers a change that meets the closed gate, and reads all the same', () => {
    const { plane, slotOf, disk } = fixture();
    const thread = plane();
    const slot = slotOf(0, Number.POSITIVE_INFINITY);
    disk.gateClosed = true;
    expect(thread.write(slot, 0, 1, bytes('x'), 0, false)).toBe(DEFER);
    expect(thread.allocate(slot, 0, 1, 3)).toBe(DEFER);
    expect(thread.read(slot, 0, 1, new Uint8Array(1), 0)).toBe(1);
  });

  it('makes a synchronous write durable before it answers', () => {
    const { plane, slotOf, disk } = fixture();
    const thread = plane();
    const slot = slotOf(0, Number.POSITIVE_INFINITY);
    thread.write(slot, 0, 1, bytes('x'), 0, false);
    expect(disk.live.flushes).toBe(0);
    thread.write(slot, 0, 1, bytes('x'), 0, true);
    expect(disk.live.flushes).toBe(1);
    expect(thread.sync(slot)).toBe(0);
    expect(disk.live.flushes).toBe(2);
  });

  it('answers a failure with its errno, and hands the sentence on', async () => {
    const { plane, slotOf, disk, reported } = fixture();
    const thread = plane();
    const slot = slotOf(0, Number.POSITIVE_INFINITY);
    disk.live.failure = new FsError('EIO', 'the table is damaged');
    expect(thread.read(slot, 0, 1, new Uint8Array(1), 0)).toBe(-errnoNumber('EIO'));
    await expect.poll(() => reported).toEqual(['the table is damaged']);
  });

  it('answers a bug with EIO and goes on', () => {
    const { plane, slotOf, disk } = fixture();
    const thread = plane();
    const slot = slotOf(0, Number.POSITIVE_INFINITY);
    disk.live.failure = new TypeError('bug');
    expect(thread.sync(slot)).toBe(-errnoNumber('EIO'));
    expect(thread.sync(slot)).toBe(0);
  });

  it('seeks data and holes, and answers ENXIO behind the last', () => {
    const { plane, slotOf } = fixture();
    const thread = plane();
    const slot = slotOf(0, Number.POSITIVE_INFINITY);
    thread.write(slot, 4096, 1, bytes('x'), 0, false);
    expect(thread.seek(slot, 0, 3)).toBe(4096);
    expect(thread.seek(slot, 4096, 4)).toBe(8192);
    expect(thread.seek(slot, 8192, 3)).toBe(-errnoNumber('ENXIO'));
  });

  it('tidies up once after a change, and not where the layers of the disk may have changed since', () => {
    const { threads, opening } = fixture();
    const { shared } = opening.acquire();
    const slot = threads.takeSlot({ contentsId: shared.id, base: 0, length: 8192, writable: true }) as number;
    let tidied = 0;
    const contents = { ...attachFake(shared), size: () => 8192, write: () => true, tidy: () => tidied++ };
    const thread = new ThreadPlane(threads.attach().plane, () => contents as never);
    thread.tidy();
    expect(tidied).toBe(0);
    thread.write(slot, 0, 1, bytes('x'), 0, false);
    thread.tidy();
    thread.tidy();
    expect(tidied).toBe(1);
    thread.write(slot, 0, 1, bytes('x'), 0, false);
    threads.publish({ shared: { id: shared.id + 1 } }, () => {});
    thread.tidy();
    expect(tidied).toBe(1);
  });

  it('forgets contents that were closed: an old slot number shows what it was given to anew', () => {
    const { plane, slotOf, threads, opening, disk } = fixture();
    const thread = plane();
    const slot = slotOf(0, 512);
    expect(thread.read(slot, 0, 1024, new Uint8Array(1024), 0)).toBe(512);
    threads.freeSlot(slot);
    opening.release();
    expect(disk.opened).toBe(0);
    expect(slotOf(4096, 1024)).toBe(slot);
    expect(thread.read(slot, 0, 4096, new Uint8Array(4096), 0)).toBe(1024);
  });
});

describe('the table of slots', () => {
  it('has DATA_HANDLES of them, then leaves files to the main thread', () => {
    const { threads, slotOf } = fixture();
    const slots = Array.from({ length: DATA_HANDLES }, () => slotOf(0, 512));
    expect(new Set(slots).size).toBe(DATA_HANDLES);
    expect(slotOf(0, 512)).toBe(undefined);
    threads.freeSlot(17);
    expect(slotOf(0, 512)).toBe(17);
  });

  it('keeps offsets above 2^32 exactly', () => {
    const { threads, opening } = fixture();
    const { shared } = opening.acquire();
    const [base, length] = [2 ** 46 + 512, 2 ** 45 + 1];
    const slot = threads.takeSlot({ contentsId: shared.id, base, length, writable: false }) as number;
    const seen: number[] = [];
    const contents = {
      ...attachFake(shared),
      size: () => 2 ** 50,
      read: (...args: unknown[]) => seen.push(...(args.slice(2) as number[])),
    };
    const thread = new ThreadPlane(threads.attach().plane, () => contents as never);
    expect(thread.read(slot, 2 ** 45 - 1, 10, new Uint8Array(10), 0)).toBe(2);
    expect(seen).toEqual([2, 2 ** 46 + 512 + 2 ** 45 - 1]);
  });
});
