/**
 * Files kept in the page cache: what the rows compare is servers, not disks. A host may take pages away while others
 * have their turn (Linux's DAMON does, after a minute), and pages come in one size from a write and in another from a
 * read, which alone makes 4K writes twice as fast or as slow. So the files are read anew, all in the same way, and locked.
 */
import { closeSync, fstatSync, fsyncSync, openSync, readSync } from 'node:fs';
import koffi from 'koffi';

/** The same numbers on Linux and FreeBSD: sys/mman.h, fcntl.h. */
const PROT_READ = 1;
const MAP_SHARED = 1;
const POSIX_FADV_DONTNEED = 4;

const STEP_BYTES = 1 << 20;

export interface HeldFile {
  readonly path: string;
  /** From its start on; left out: all of it. */
  readonly bytes?: number;
}

/** Read the files into the page cache and keep them there until the result is disposed of. @returns what could not be locked */
export function holdInPageCache(files: readonly HeldFile[]): Disposable & { readonly failed: readonly string[] } {
  const library = koffi.load(null);
  const mmap = library.func('int64_t mmap(void *at, size_t bytes, int protection, int flags, int fd, int64_t offset)');
  const munmap = library.func('int munmap(int64_t at, size_t bytes)');
  const mlock = library.func('int mlock(int64_t at, size_t bytes)');
  const fadvise = library.func('int posix_fadvise(int fd, int64_t offset, int64_t bytes, int advice)');
  const mapped: { at: number; bytes: number }[] = [];
  const failed: string[] = [];
  for (const { path, bytes: wanted } of files) {
    const fd = openSync(path, 'r+');
    try {
      fsyncSync(fd);
      fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
      const bytes = Math.min(wanted ?? Number.POSITIVE_INFINITY, fstatSync(fd).size);
      const buffer = new Uint8Array(STEP_BYTES);
      for (let at = 0; at < bytes; at += STEP_BYTES) readSync(fd, buffer, 0, STEP_BYTES, at);
      const at = mmap(null, bytes, PROT_READ, MAP_SHARED, fd, 0) as number;
      if (at !== -1) mapped.push({ at, bytes });
      if (at === -1 || mlock(at, bytes) !== 0) failed.push(path);
    } finally {
      closeSync(fd);
    }
  }
  return {
    failed,
    [Symbol.dispose]() {
      for (const { at, bytes } of mapped.splice(0)) munmap(at, bytes);
    },
  };
}
