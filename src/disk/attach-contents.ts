/** From the plain data that another thread posted to a `Contents` of this thread. */
import type { Image } from '../qcow2/image.ts';
import { attachChain, type SharedChain } from './chain.ts';
import { LiveContents, SnapshotContents } from './contents.ts';
import type { Contents, SharedContents } from './disk.ts';

/** The views that are posted, see `SharedContents`. */
export interface SharedView extends SharedContents {
  /** Unique in this process for each chain: a thread makes its objects once. */
  readonly chainId: number;
  readonly chain: SharedChain;
  /** Undefined: the live contents. */
  readonly snapshot:
    | { readonly l1: SharedArrayBuffer; readonly l1Entries: number; readonly base: number; readonly size: number }
    | undefined;
}

/** Images that this thread has attached, by chain. They live as long as the thread: a mount's disks do as well. */
const attached = new Map<number, Image>();

export function attachContents(shared: SharedContents): Contents {
  const { chainId, chain, snapshot } = shared as SharedView;
  let image = attached.get(chainId);
  if (image === undefined) {
    image = attachChain(chain);
    attached.set(chainId, image);
  }
  if (snapshot === undefined) return new LiveContents(image);
  const table = { view: new DataView(snapshot.l1), entries: snapshot.l1Entries };
  return new SnapshotContents(image, table, snapshot.base, snapshot.size);
}
