/** IMAGE_OR_DISK[@NAME]: a disk, or one of its checkpoints. */
import { existsSync } from 'node:fs';

export interface CheckpointPath {
  readonly path: string;
  /** Undefined: the disk as it is now. */
  readonly name: string | undefined;
}

/**
 * What exists under the whole text is that, whatever characters it has. Else the longest start of it that ends before
 * an @ and exists is the path, and what follows the @ the name; names may contain @ too.
 */
export function splitCheckpointPath(text: string): CheckpointPath {
  if (existsSync(text)) return { path: text, name: undefined };
  for (let at = text.lastIndexOf('@'); at > 0; at = text.lastIndexOf('@', at - 1)) {
    if (existsSync(text.slice(0, at))) return { path: text.slice(0, at), name: text.slice(at + 1) };
  }
  // Nothing is there: the message is about the file.
  const at = text.lastIndexOf('@');
  return at > 0 ? { path: text.slice(0, at), name: text.slice(at + 1) } : { path: text, name: undefined };
}
