import { describe, expect, it } from 'vitest';
import { NodeTable } from '../../src/fuse/node-table.ts';
import { makeMemoryDisk } from './memory-disk.ts';
import { MemoryFileSystem } from './memory-file-system.ts';

function table() {
  const fileSystem = new MemoryFileSystem(makeMemoryDisk(), undefined);
  const file = fileSystem.root.entries.get('hello.txt')!;
  return { nodes: new NodeTable(fileSystem.root), root: fileSystem.root, file, id: BigInt(file.ino) };
}

describe('the table of nodes', () => {
  it('knows the root from the start, and for good', () => {
    const { nodes, root } = table();
    nodes.forget(1n, 1000n);
    expect(nodes.node(1n)).toBe(root);
  });

  it('knows a node until as many references are forgotten as were given', () => {
    const { nodes, file, id } = table();
    nodes.remember(file);
    nodes.remember(file);
    nodes.remember(file);
    nodes.forget(id, 2n);
    expect(nodes.node(id)).toBe(file);
    nodes.forget(id, 1n);
    expect(() => nodes.node(id)).toThrow(expect.objectContaining({ errno: 'ESTALE' }));
  });

  it('a node that was never told is ESTALE, and forgetting it does nothing', () => {
    const { nodes, id } = table();
    nodes.forget(id, 1n);
    expect(() => nodes.node(id)).toThrow(expect.objectContaining({ errno: 'ESTALE' }));
  });

  it('a file is no directory, and the other way round', () => {
    const { nodes, file, id } = table();
    nodes.remember(file);
    expect(() => nodes.directory(id)).toThrow(expect.objectContaining({ errno: 'ENOTDIR' }));
    expect(() => nodes.file(1n)).toThrow(expect.objectContaining({ errno: 'EISDIR' }));
  });
});
