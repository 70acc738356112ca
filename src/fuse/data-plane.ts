/**
 * What the data threads need of whoever holds the bytes: every call is synchronous and allocates nothing.
 * Results below zero are negated errno numbers of this host, as the kernel's reply header wants them.
 */
export interface DataPlane {
  /** Copy up to `size` bytes from `offset` to `reply[at…]`. Returns the count: short only at the end of the file. */
  read(fh: number, offset: number, size: number, reply: Uint8Array, at: number): number;
  /** Take all of `request[at, at + size)`. Returns `size`. `sync`: durable before it returns (O_SYNC, O_DSYNC). */
  write(fh: number, offset: number, size: number, request: Uint8Array, at: number, sync: boolean): number;
  /** SEEK_DATA (3) and SEEK_HOLE (4) of lseek(2). Returns the offset, or -ENXIO past the last of them. */
  seek(fh: number, offset: number, whence: number): number;
  /** fallocate(2) with Linux's mode bits. Returns 0. */
  allocate(fh: number, offset: number, length: number, mode: number): number;
  /** close(2) of one descriptor. Returns 0. */
  flush(fh: number): number;
  /** fsync(2), fdatasync(2). Returns 0 when every write that returned before is durable. */
  sync(fh: number): number;
  /** Called after each answer: what the request has left to do and nobody waits for. Throws nothing. */
  tidy(): void;
}

/** "Not mine, or not now": the request goes on to the control plane as it is. Far below every errno. */
export const DEFER = -0x10000;

/** fh numbers below this are slots of the shared handle table; the control plane's own handles start here. */
export const DATA_HANDLES = 4096;
