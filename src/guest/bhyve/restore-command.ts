/** The `bhyve -r …` line that brings a guest back, from whatever is known of how it was started. */
import type { GuestIdentity, RestoreCommand, RestoreRequest } from '../guest.ts';
import { deviceArguments, hasBootRom, withRestore } from './command-line.ts';
import { restorePathBytesMax } from './generation.ts';

/** What this host knows of the guest now. */
export interface PresentGuest {
  readonly name: string;
  readonly version: string;
  readonly osreldate: number | undefined;
  /** From the user's configuration; undefined without one. */
  readonly configured: readonly string[] | undefined;
}

export function composeRestoreCommand(request: RestoreRequest, present: PresentGuest): RestoreCommand {
  const { saved } = request;
  const recorded = saved !== undefined && saved.argv.length > 0 ? saved.argv : undefined;
  const known = present.configured ?? recorded;
  const argv = withRestore(known ?? template(present.name, request.diskPath), statePathFor(request, present.osreldate));
  const warnings = [
    ...buildWarnings(saved, present),
    ...(known === undefined
      ? [
          'How the guest was started is not known: replace the devices of this line by those that it had, in the same slots.',
        ]
      : deviceWarnings(known, recorded, request.diskPath)),
  ];
  if (!hasBootRom(argv) && !argv.includes('-k')) {
    warnings.push('Without a boot ROM the guest has to be loaded by bhyveload first, for a restore too.');
  }
  return { argv, warnings };
}

function statePathFor({ statePath, shortStatePath }: RestoreRequest, release: number | undefined): string {
  return Buffer.byteLength(statePath) > restorePathBytesMax(release) ? shortStatePath : statePath;
}

/** Enough to show the form; memory and vCPUs come from the saved state. */
const template = (name: string, diskPath: string): string[] => [
  'bhyve',
  '-A',
  '-H',
  '-P',
  ...['-s', '0,hostbridge'],
  ...['-s', '31,lpc'],
  ...['-s', `3,virtio-blk,${diskPath}`],
  ...['-l', 'bootrom,/usr/local/share/uefi-firmware/BHYVE_UEFI.fd'],
  name,
];

function buildWarnings(saved: GuestIdentity | undefined, present: PresentGuest): string[] {
  if (saved === undefined)
    return ['The checkpoint does not say which bhyve saved it: only the same build restores it.'];
  const now = present.osreldate === undefined ? undefined : String(present.osreldate);
  if (saved.hostRelease !== undefined && now !== undefined && saved.hostRelease !== now) {
    return [
      `The checkpoint was saved on a host with kern.osreldate ${saved.hostRelease}, this one has ${now}: bhyve restores only what the same build has saved.`,
    ];
  }
  if (saved.version !== present.version) {
    return [
      `The checkpoint was saved by ${saved.version}, this host has ${present.version}: bhyve restores only what the same build has saved.`,
    ];
  }
  return [];
}

function deviceWarnings(known: readonly string[], recorded: readonly string[] | undefined, diskPath: string): string[] {
  const warnings: string[] = [];
  const devices = deviceArguments(known);
  if (devices.length > 0 && !devices.some((device) => device.split(',').includes(diskPath))) {
    warnings.push(`None of the guest's devices is the disk '${diskPath}'.`);
  }
  if (recorded !== undefined && recorded !== known && devices.length > 0) {
    const before = deviceArguments(recorded);
    const differ = [
      ...before.filter((device) => !devices.includes(device)).map((device) => `-s ${device} is missing`),
      ...devices.filter((device) => !before.includes(device)).map((device) => `-s ${device} is new`),
    ];
    if (differ.length > 0) {
      warnings.push(`The guest had other devices when it was saved (${differ.join(', ')}): bhyve wants the same ones.`);
    }
  }
  return warnings;
}
