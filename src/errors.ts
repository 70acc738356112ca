/** Errno names that vdskfs answers with. Names, not numbers: the numbers differ between FreeBSD and Linux. */
export type Errno =
  | 'EACCES'
  | 'EAGAIN'
  | 'EBADF'
  | 'EBUSY'
  | 'EEXIST'
  | 'EFBIG'
  | 'EINTR'
  | 'EINVAL'
  | 'EIO'
  | 'EISDIR'
  | 'ENAMETOOLONG'
  | 'ENODATA'
  | 'ENOENT'
  | 'ENOSPC'
  | 'ENOSYS'
  | 'ENOTCONN'
  | 'ENOTDIR'
  | 'ENOTEMPTY'
  | 'ENOTSUP'
  | 'ENXIO'
  | 'EOVERFLOW'
  | 'EPERM'
  | 'ERANGE'
  | 'EROFS'
  | 'ESTALE'
  | 'ETIMEDOUT'
  | 'EXDEV';

/** A failure the caller must expect. The message is one sentence: what, which file, why, what to do. */
export class FsError extends Error {
  override readonly name: string = 'FsError';
  readonly errno: Errno;

  constructor(errno: Errno, message: string, options?: ErrorOptions) {
    super(message, options);
    this.errno = errno;
  }
}

/** The image lied: a number in it is out of its range. Says the field, its value and its place in the file. */
export class CorruptImage extends FsError {
  override readonly name = 'CorruptImage';

  constructor(message: string, options?: ErrorOptions) {
    super('EIO', message, options);
  }
}
