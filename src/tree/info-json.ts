/** The text of info.json, of a disk and of a checkpoint (INTERFACE.md section 3). */
import type { Checkpoint, Disk } from '../disk/disk.ts';

/** No guest runs on a disk that vdskfs serves by itself. */
const NO_GUEST = { kind: 'none', name: null, alive: false } as const;

const pretty = (value: unknown): string => `${JSON.stringify(value, null, 2)}\n`;

const isoTime = (ms: number): string => new Date(ms).toISOString();

const listed = ({ name, id, createdMs, vmStateSize }: Checkpoint) => ({
  name,
  id,
  created: isoTime(createdMs),
  vmStateSize,
});

export function diskInfoText(disk: Disk): string {
  const checkpoints = disk.checkpoints();
  const { name, image, virtualSize, allocatedSize, format, chain } = disk.info();
  return pretty({
    name,
    image,
    owner: 'served',
    readOnly: disk.readOnly ?? null,
    virtualSize,
    allocatedSize,
    format,
    chain,
    guest: NO_GUEST,
    snapshots: checkpoints.filter(({ kind }) => kind === 'internal').map(listed),
    overlays: checkpoints.filter(({ kind }) => kind === 'external').map(listed),
  });
}

export function checkpointInfoText(checkpoint: Checkpoint): string {
  const { name, realName, id, createdMs, virtualSize, vmStateSize, vmClockNs, layer, consistency } = checkpoint;
  // Which guest the memory came from is not recorded in a snapshot that QEMU made.
  const memory = vmStateSize > 0 ? { guest: { kind: 'unknown', name: null }, guestClockNs: vmClockNs } : {};
  return pretty({
    name,
    realName,
    id,
    created: isoTime(createdMs),
    virtualSize,
    vmStateSize,
    layer,
    consistency,
    ...memory,
  });
}
