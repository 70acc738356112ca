/** From the plain data that another thread posted to a `Contents` of this thread. */
import { type SharedStateArea, StateArea } from '../qcow2/vm-state.ts';
import { HostFile, type SharedFile } from '../storage/host-file.ts';
import { attachChain, backingOf, type SharedChain } from './chain.ts';
import { FileContents, LayerContents, LiveContents, SnapshotContents } from './contents.ts';
import type { Contents, SharedContents } from './disk.ts';
import { WrittenState } from './state-contents.ts';
import { type SharedStateFile, StateFileContents } from './state-file.ts';

/** The views that are posted, see `SharedContents`. */
export type SharedView = { readonly id: number } & (
  | { readonly kind: 'live' | 'layer'; readonly chain: SharedChain }
  | { readonly kind: 'snapshot'; readonly chain: SharedChain; readonly snapshot: SharedSnapshot }
  /** Guest state that is being written into the top image. */
  | { readonly kind: 'vm-state'; readonly chain: SharedChain; readonly area: SharedStateArea }
  | { readonly kind: 'file'; readonly file: SharedFile }
  | { readonly kind: 'state'; readonly state: SharedStateFile }
);

/** A snapshot of the top image of the chain. `base` and `size` in guest bytes. */
export interface SharedSnapshot {
  readonly l1: SharedArrayBuffer;
  readonly l1Entries: number;
  readonly diskBytes: number | undefined;
  readonly base: number;
  readonly size: number;
}

export function attachContents(shared: SharedContents): Contents {
  const view = shared as unknown as SharedView;
  if (view.kind === 'file') return new FileContents(HostFile.adopt(view.file));
  if (view.kind === 'state') return StateFileContents.attach(view.state);
  const top = attachChain(view.chain);
  if (view.kind === 'layer') return new LayerContents(backingOf(top));
  if (top.image === undefined) throw new Error('only a layer that is read may be raw');
  if (view.kind === 'vm-state') return new WrittenState(top.image, new StateArea(view.area));
  if (view.kind !== 'snapshot') return new LiveContents(top.image);
  const { l1, l1Entries, diskBytes, base, size } = view.snapshot;
  const table = { view: new DataView(l1), entries: l1Entries, ...(diskBytes === undefined ? {} : { diskBytes }) };
  return new SnapshotContents(top.image, table, base, size);
}
