/** What `info` and `ls` know of a disk, from the image file or from a running mount. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Checkpoint, Disk, DiskInfo } from '../disk/disk.ts';
import { withDisk } from './image-target.ts';
import { mountedDisk } from './target.ts';

/** A checkpoint as the JSON of `info` and `ls` has it. What a mount does not tell is absent. */
export interface ListedCheckpoint {
  readonly name: string;
  readonly realName?: string;
  readonly id: string;
  /** ISO 8601. */
  readonly created: string;
  /** Bytes of its disk. */
  readonly virtualSize?: number;
  /** Bytes of guest memory and devices; 0 without. */
  readonly vmStateSize: number;
  readonly vmClockNs?: number;
  readonly layer?: string;
  readonly consistency?: Checkpoint['consistency'];
}

/** info.json of the disk (INTERFACE.md, section 3), as far as it is known without a mount. */
export interface Listing extends DiskInfo {
  readonly snapshots: readonly ListedCheckpoint[];
  readonly overlays: readonly ListedCheckpoint[];
  /** Of a mounted disk. */
  readonly owner?: 'served' | 'attached';
  /** Of a mounted disk: why it cannot be changed; null if it can. */
  readonly readOnly?: string | null;
}

/** The disk that `path` names; an image is opened for reading only. */
export async function listingOf(path: string): Promise<Listing> {
  const directory = mountedDisk(path);
  if (directory !== undefined) return mountedListing(directory);
  return withDisk(path, { readOnly: true }, async (disk) => listDisk(disk));
}

/** The disk's info.json, each checkpoint completed by its own. */
function mountedListing(directory: string): Listing {
  const read = (...path: string[]) => JSON.parse(readFileSync(join(directory, ...path, 'info.json'), 'utf8'));
  const completed =
    (folder: string) =>
    (one: ListedCheckpoint): ListedCheckpoint => {
      try {
        const { guestClockNs, ...details } = read(folder, one.name);
        return { ...one, ...details, vmClockNs: guestClockNs };
      } catch {
        return one; // deleted since the list was made
      }
    };
  const listing = read() as Listing;
  return {
    ...listing,
    snapshots: listing.snapshots.map(completed('snapshots')),
    overlays: listing.overlays.map(completed('overlays')),
  };
}

export function listDisk(disk: Pick<Disk, 'info' | 'checkpoints'>): Listing {
  const of = (kind: Checkpoint['kind']): ListedCheckpoint[] =>
    disk
      .checkpoints()
      .filter((one) => one.kind === kind)
      .map(listedCheckpoint);
  return { ...disk.info(), snapshots: of('internal'), overlays: of('external') };
}

const listedCheckpoint = (one: Checkpoint): ListedCheckpoint => ({
  name: one.name,
  realName: one.realName,
  id: one.id,
  created: new Date(one.createdMs).toISOString(),
  virtualSize: one.virtualSize,
  vmStateSize: one.vmStateSize,
  vmClockNs: one.vmClockNs,
  layer: one.layer,
  consistency: one.consistency,
});
