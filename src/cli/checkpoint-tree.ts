/** The checkpoints of a disk as a tree: the trunk leads to the live disk, branches are what a roll back has left behind. */
import { basename } from 'node:path';
import type { ListedCheckpoint, Listing } from './listing.ts';

/** A checkpoint, or the live disk at the end of the trunk. */
export interface TreeNode {
  /** Undefined: the live disk. */
  readonly checkpoint: ListedCheckpoint | undefined;
  readonly kind: 'internal' | 'external' | 'live';
  /** What was taken after it and is not on the way to the live disk. */
  readonly branch: readonly TreeNode[];
}

/** An overlay, and the checkpoint that its making took; none for an overlay that a roll back made. */
interface Overlay {
  readonly file: string;
  readonly point: ListedCheckpoint | undefined;
}

/** The trunk, oldest first, the live disk last. */
export function checkpointTree({ chain, snapshots, overlays }: Listing): readonly TreeNode[] {
  const files = chain.map(({ file }) => basename(file)).reverse();
  const live = files.at(-1) ?? '';
  const bottom = files[0] ?? '';

  const internal = new Map<string, ListedCheckpoint[]>();
  for (const one of snapshots) push(internal, one.layer ?? live, one);
  const above = new Map<string, Overlay[]>();
  const known = new Set<string>();
  for (const point of overlays) {
    const file = basename(point.id);
    known.add(file);
    push(above, point.layer ?? live, { file, point });
  }
  for (const [index, file] of files.entries()) {
    const below = files[index - 1];
    if (below !== undefined && !known.has(file)) push(above, below, { file, point: undefined });
  }

  /** Files that are on the way already: whatever a listing says, the tree ends. */
  const seen = new Set<string>();
  const nodesIn = (file: string): TreeNode[] => {
    if (seen.has(file)) return [];
    seen.add(file);
    const over = [...(above.get(file) ?? [])].sort(byTime);
    const goesOn = over.find((one) => files.includes(one.file)) ?? (file === live ? undefined : over.at(-1));
    const nodes: TreeNode[] = (internal.get(file) ?? []).map((checkpoint) => ({
      checkpoint,
      kind: 'internal',
      branch: [],
    }));
    for (const one of over) {
      if (one === goesOn || one.point === undefined) continue;
      nodes.push({ checkpoint: one.point, kind: 'external', branch: nodesIn(one.file) });
    }
    nodes.sort((a, b) => createdMs(a.checkpoint) - createdMs(b.checkpoint));
    if (goesOn?.point !== undefined) nodes.push({ checkpoint: goesOn.point, kind: 'external', branch: [] });
    if (goesOn !== undefined) nodes.push(...nodesIn(goesOn.file));
    if (file === live) nodes.push({ checkpoint: undefined, kind: 'live', branch: [] });
    return nodes;
  };
  const trunk = nodesIn(bottom);
  // What hangs on a file that is not in sight is listed all the same.
  const lost = [...internal.keys(), ...above.keys()].filter((file) => !seen.has(file));
  return [...lost.flatMap(nodesIn), ...trunk];
}

/** Each node with the lines that are drawn before its name, from the top down. */
export function drawTree(nodes: readonly TreeNode[]): { readonly lines: string; readonly node: TreeNode }[] {
  const rows: { lines: string; node: TreeNode }[] = [];
  const draw = (level: readonly TreeNode[], before: string): void => {
    for (const [index, node] of level.entries()) {
      const last = index === level.length - 1;
      rows.push({ lines: `${before}${last ? '└─ ' : '├─ '}`, node });
      draw(node.branch, `${before}${last ? '   ' : '│  '}`);
    }
  };
  draw(nodes, '');
  return rows;
}

function push<K, V>(map: Map<K, V[]>, key: K, value: V): void {
  const list = map.get(key);
  if (list === undefined) map.set(key, [value]);
  else list.push(value);
}

const createdMs = (one: ListedCheckpoint | undefined): number => (one === undefined ? 0 : Date.parse(one.created));
const byTime = (a: Overlay, b: Overlay): number => createdMs(a.point) - createdMs(b.point);
