/**
 * The file operations that an image needs, all synchronous, all positional. `HostFile` is the one for real files;
 * tests put a recorder or a plain array behind the same interface.
 */
export interface Storage {
  /** What to call it in messages: the path as the user knows it. */
  readonly path: string;
  readonly readOnly: boolean;
  /** Size now, in bytes. */
  size(): number;
  /** Fill `target[at, at + length)` from `position`. Returns the bytes read: fewer only at the end of the file. */
  read(target: Uint8Array, at: number, length: number, position: number): number;
  /** Write all of `source[at, at + length)` at `position`. @throws FsError ENOSPC, EIO, … with nothing promised about the range */
  write(source: Uint8Array, at: number, length: number, position: number): void;
  /** Make every completed write durable (fdatasync). */
  flush(): void;
  /** Set the size in bytes. */
  truncate(size: number): void;
  /**
   * Give the range back to the host; it reads as zeros afterwards.
   * @returns false where the host file system cannot: the bytes are then unchanged
   */
  punch(position: number, length: number): boolean;
  /** SEEK_DATA from `position`: where data starts at or after it, or -1 if only a hole follows. */
  nextData(position: number): number;
  /** SEEK_HOLE from `position`: where a hole starts at or after it (the file's size if none). */
  nextHole(position: number): number;
  /** Bytes that the host has allocated to the file. */
  allocatedBytes(): number;
}
