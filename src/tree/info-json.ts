/** The text of info.json, of a disk and of a checkpoint (INTERFACE.md section 3). */
import type { Checkpoint, CheckpointDetails, Disk, Operation } from '../disk/disk.ts';
import type { MachineStatus } from './machine.ts';

const pretty = (value: unknown): string => `${JSON.stringify(value, null, 2)}\n`;

const isoTime = (ms: number): string => new Date(ms).toISOString();

const listed = ({ name, id, createdMs, vmStateSize }: Checkpoint) => ({
  name,
  id,
  created: isoTime(createdMs),
  vmStateSize,
});

/** @param operation what runs on the disk right now */
export function diskInfoText(
  disk: Disk,
  { kind, name: guest, alive }: MachineStatus,
  operation: Operation | undefined,
): string {
  const checkpoints = disk.checkpoints();
  const { name, image, virtualSize, allocatedSize, format, chain } = disk.info();
  return pretty({
    name,
    image,
    owner: disk.owner,
    // Read while its guest writes it, without asking the guest.
    ...(disk.owner === 'attached' && { live: 'inconsistent' }),
    readOnly: disk.readOnly ?? null,
    virtualSize,
    allocatedSize,
    format,
    chain,
    guest: { kind, name: guest ?? null, alive },
    operation: operation ?? null,
    snapshots: checkpoints.filter(({ kind }) => kind === 'internal').map(listed),
    overlays: checkpoints.filter(({ kind }) => kind === 'external').map(listed),
  });
}

export function checkpointInfoText(checkpoint: Checkpoint, { consistency, guest }: CheckpointDetails): string {
  const { name, realName, id, createdMs, virtualSize, vmStateSize, vmClockNs, layer } = checkpoint;
  // Which guest the memory came from is not recorded in a snapshot that QEMU made.
  const known = guest ?? (vmStateSize > 0 ? { kind: 'unknown', name: null } : undefined);
  return pretty({
    name,
    realName,
    id,
    created: isoTime(createdMs),
    virtualSize,
    vmStateSize,
    layer,
    consistency,
    ...(known !== undefined && { guest: known }),
    ...(vmStateSize > 0 && { guestClockNs: vmClockNs }),
  });
}
