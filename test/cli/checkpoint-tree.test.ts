import { describe, expect, it } from 'vitest';
import { checkpointTree, drawTree } from '../../src/cli/checkpoint-tree.ts';
import type { ListedCheckpoint, Listing } from '../../src/cli/listing.ts';

const at = (minute: number): string => new Date(Date.UTC(2026, 0, 1, 0, minute)).toISOString();
const internal = (name: string, layer: string, minute: number): ListedCheckpoint => ({
  name,
  id: '1',
  layer,
  created: at(minute),
  vmStateSize: 0,
});
/** `over`: the file that shows the checkpoint; `file`: the overlay that was made for it. */
const external = (name: string, over: string, file: string, minute: number): ListedCheckpoint => ({
  ...internal(name, over, minute),
  id: `/images/${file}`,
});

const draw = (listing: Pick<Listing, 'snapshots' | 'overlays'> & { files: string[] }): string[] =>
  drawTree(
    checkpointTree({
      ...listing,
      chain: listing.files.map((file) => ({ file: `/images/${file}`, format: 'qcow2', virtualSize: 0 })),
    } as unknown as Listing),
  ).map(({ lines, node }) => lines + (node.checkpoint?.name ?? '(live)'));

describe('the tree', () => {
  it('of an image without checkpoints is the live disk', () => {
    expect(draw({ files: ['vm.qcow2'], snapshots: [], overlays: [] })).toEqual(['└─ (live)']);
  });

  it('of both kinds in one line is one line', () => {
    expect(
      draw({
        files: ['nightly.qcow2', 'vm.qcow2'],
        snapshots: [internal('a', 'vm.qcow2', 1), internal('b', 'nightly.qcow2', 3)],
        overlays: [external('nightly', 'vm.qcow2', 'nightly.qcow2', 2)],
      }),
    ).toEqual(['├─ a', '├─ nightly', '├─ b', '└─ (live)']);
  });

  it('shows what a roll back has left as a branch of the checkpoint it went back to', () => {
    expect(
      draw({
        files: ['vm~~1.qcow2', 'vm.qcow2'],
        snapshots: [internal('a', 'vm.qcow2', 1), internal('in', 'one.qcow2', 3), internal('z', 'vm~~1.qcow2', 9)],
        overlays: [external('one', 'vm.qcow2', 'one.qcow2', 2), external('two', 'one.qcow2', 'two.qcow2', 4)],
      }),
    ).toEqual(['├─ a', '├─ one', '│  ├─ in', '│  └─ two', '├─ z', '└─ (live)']);
  });

  it('ends whatever the files claim', () => {
    expect(
      draw({
        files: ['a.qcow2'],
        snapshots: [internal('s', 'elsewhere.qcow2', 1)],
        overlays: [external('x', 'b.qcow2', 'c.qcow2', 2), external('y', 'c.qcow2', 'b.qcow2', 3)],
      }),
    ).toEqual(['├─ s', '├─ x', '├─ y', '└─ (live)']);
  });
});
