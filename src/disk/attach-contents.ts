/** From the plain data that another thread posted to a `Contents` of this thread. */
import type { Image } from '../qcow2/image.ts';
import { type SharedStateArea, StateArea } from '../qcow2/vm-state.ts';
import { attachChain, type SharedChain } from './chain.ts';
import { LiveContents, SnapshotContents } from './contents.ts';
import type { Contents, SharedContents } from './disk.ts';
import { WrittenState } from './state-contents.ts';

/** The views that are posted, see `SharedContents`. */
export interface SharedView extends SharedContents {
  /** Unique in this process for each chain: a thread makes its objects once. */
  readonly chainId: number;
  readonly chain: SharedChain;
  /** Undefined: the live contents. */
  readonly snapshot:
    | {
        readonly l1: SharedArrayBuffer;
        readonly l1Entries: number;
        readonly diskBytes: number;
        readonly base: number;
        readonly size: number;
      }
    | undefined;
  /** Guest state that is being written; then there is no `snapshot`. */
  readonly state?: SharedStateArea;
}

/** Images that this thread has attached, by chain. They live as long as the thread: a mount's disks do as well. */
const attached = new Map<number, Image>();

export function attachContents(shared: SharedContents): Contents {
  const { chainId, chain, snapshot, state } = shared as SharedView;
  let image = attached.get(chainId);
  if (image === undefined) {
    image = attachChain(chain);
    attached.set(chainId, image);
  }
  if (state !== undefined) return new WrittenState(image, new StateArea(state));
  if (snapshot === undefined) return new LiveContents(image);
  const table = { view: new DataView(snapshot.l1), entries: snapshot.l1Entries, diskBytes: snapshot.diskBytes };
  return new SnapshotContents(image, table, snapshot.base, snapshot.size);
}
