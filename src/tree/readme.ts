/** The text of README in the root of the mount. */

/** @param disk name of a disk that is there, for the examples */
export function readmeText(disk: string): string {
  const path = /^[\w.@%+=:,-]+$/.test(disk) ? disk : `'${disk.replaceAll("'", "'\\''")}'`;
  return `This is a vdskfs mount: one directory per qcow2 disk.

  DISK/disk.raw       the live contents, as a raw disk that can be read and written
  DISK/partitions/    the partitions of disk.raw, one file each, numbered as in /dev/sdaN
  DISK/snapshots/     checkpoints, kept inside the qcow2 file; each shows the disk of its moment, read-only
  DISK/overlays/      checkpoints that are a chain of qcow2 files; none can be taken yet
  DISK/control        write one command, read its answer
  DISK/info.json      size, format, features, checkpoints

Five things to try:

  1. Take a checkpoint:         mkdir ${path}/snapshots/before-upgrade
  2. Look into it:              mount -o ro,noload,loop ${path}/snapshots/before-upgrade/partitions/1.raw /mnt
  3. Copy it out, holes kept:   cp --sparse=always ${path}/snapshots/before-upgrade/disk.raw copy.raw
  4. Go back to it:             echo rollback before-upgrade > ${path}/control   (no guest may be running)
  5. Delete it, free its space: rmdir ${path}/snapshots/before-upgrade

When a call fails, cat ${path}/control says why; echo help > ${path}/control, then cat it, for all commands.
`;
}
