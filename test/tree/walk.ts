/** Short ways to say what tests do with a tree. */
import { constants } from 'node:fs';
import { FsError } from '../../src/errors.ts';
import type { Caller, DirectoryNode, FileNode, Node, OpenFile } from '../../src/fuse/filesystem.ts';

export const caller: Caller = { uid: 0, gid: 0, pid: 1, signal: new AbortController().signal };

export const { O_RDONLY, O_WRONLY, O_RDWR, O_TRUNC } = constants;

/** The node at a path from `root`. */
export async function at(root: DirectoryNode, path: string): Promise<Node> {
  let node: Node = root;
  for (const name of path.split('/')) node = await (node as DirectoryNode).lookup(name);
  return node;
}

export const directoryAt = async (root: DirectoryNode, path: string): Promise<DirectoryNode> =>
  (await at(root, path)) as DirectoryNode;

export const open = async (root: DirectoryNode, path: string, flags = O_RDONLY): Promise<OpenFile> =>
  ((await at(root, path)) as FileNode).open(flags, caller);

export const names = async (root: DirectoryNode, path: string): Promise<string[]> =>
  (await (await directoryAt(root, path)).list()).map(({ name }) => name);

/** All of a file, as text. */
export async function text(root: DirectoryNode, path: string): Promise<string> {
  const file = await open(root, path);
  try {
    return Buffer.from(await file.read(0, 1 << 20, caller)).toString();
  } finally {
    await file.release();
  }
}

/** `echo LINE > DISK/control`. */
export async function command(root: DirectoryNode, disk: string, line: string): Promise<void> {
  const control = await open(root, `${disk}/control`, O_WRONLY);
  try {
    await control.write(0, Buffer.from(`${line}\n`), false, caller);
  } finally {
    await control.release();
  }
}

/** The errno that `work` fails with. */
export async function errnoOf(work: Promise<unknown>): Promise<string> {
  try {
    await work;
  } catch (error) {
    if (error instanceof FsError) return error.errno;
    throw error;
  }
  return 'no error';
}
