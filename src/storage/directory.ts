import { closeSync, fsyncSync, openSync } from 'node:fs';

/** A new name, or a name that is gone, is durable once its directory is. */
export function syncDirectory(path: string): void {
  const fd = openSync(path, 'r');
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}
