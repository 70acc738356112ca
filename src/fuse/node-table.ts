import { FsError } from '../errors.ts';
import type { DirectoryNode, FileNode, Node } from './filesystem.ts';

const ROOT_INO = 1;

/**
 * The nodes that the kernel knows, by nodeid (which is their ino), with their lookup counts: each answer that carries
 * an ENTRY adds one, FORGET subtracts. The root is always known.
 */
export class NodeTable {
  readonly #known = new Map<number, { readonly node: Node; lookups: number }>();

  constructor(root: DirectoryNode) {
    this.#known.set(ROOT_INO, { node: root, lookups: 1 });
  }

  /** The kernel is about to be told of this node. */
  remember(node: Node): void {
    const known = this.#known.get(node.ino);
    if (known === undefined) this.#known.set(node.ino, { node, lookups: 1 });
    else known.lookups++;
  }

  /** The kernel dropped `count` of the references that it was given. */
  forget(nodeid: bigint, count: bigint): void {
    const ino = Number(nodeid);
    const known = this.#known.get(ino);
    if (known === undefined || ino === ROOT_INO) return;
    known.lookups -= Number(count);
    if (known.lookups <= 0) this.#known.delete(ino);
  }

  /** @throws FsError ESTALE if the kernel was never told of it, or forgot it */
  node(nodeid: bigint): Node {
    const known = this.#known.get(Number(nodeid));
    if (known === undefined) throw new FsError('ESTALE', `node ${nodeid} is not known any more: open the file again`);
    return known.node;
  }

  /** @throws FsError ENOTDIR */
  directory(nodeid: bigint): DirectoryNode {
    const node = this.node(nodeid);
    if (node.kind !== 'directory') throw new FsError('ENOTDIR', `node ${nodeid} is not a directory`);
    return node;
  }

  /** @throws FsError EISDIR */
  file(nodeid: bigint): FileNode {
    const node = this.node(nodeid);
    if (node.kind !== 'file') throw new FsError('EISDIR', `node ${nodeid} is a directory`);
    return node;
  }

  get size(): number {
    return this.#known.size;
  }
}
