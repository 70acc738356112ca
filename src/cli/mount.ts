import { availableParallelism } from 'node:os';
import { resolve } from 'node:path';
import { type Command, Option } from 'commander';
import { countArgument, example, folderArgument, foldersArgument, sizeArgument } from './arguments.ts';
import { isDetachedServer, startDetached } from './detach.ts';
import { type DriverName, driverNames } from './driver-name.ts';
import { exitStatus } from './failure.ts';
import { DEFAULT_GUEST_TIMEOUT, diskArgument, type GuestAddresses, guestArgument } from './guest-options.ts';
import { type LogLevel, logLevels, setLogLevel } from './log.ts';

interface MountFlags {
  readonly readOnly?: boolean;
  readonly foreground?: boolean;
  readonly allowOther?: boolean;
  readonly threads: number;
  readonly poll: number;
  readonly cache?: number;
  readonly replace?: boolean;
  readonly backingRoot?: readonly string[];
  readonly overlayDir?: string;
  readonly guest?: GuestAddresses;
  readonly attached?: ReadonlySet<string>;
  readonly guestTimeout: number;
  readonly guestConfig?: string;
  readonly driver: DriverName;
  readonly logLevel: LogLevel;
}

/** Two wake each other on the caller's own core; more gain only where there are more cores (DESIGN.md, section 1). */
const defaultThreads = Math.max(2, Math.min(4, availableParallelism()));

/**
 * Measured on two cores: 4K random reads of one job rise from 38 to 49 k/s with 15 µs as with 40, those of eight stay as
 * they are. On a single core, the one who waits would keep the client from asking.
 */
const defaultPoll = availableParallelism() > 1 ? 20 : 0;

export function addMount(program: Command): void {
  program
    .command('mount')
    .description('show disks as files and folders; returns when the tree answers')
    .usage('[options] <image-or-dir...> <mountpoint>')
    .argument('<paths...>', 'qcow2 files, or folders of them, and last the empty directory to mount on')
    .option('--read-only', 'change nothing in the images')
    .option('--foreground', 'stay, and end the mount on Ctrl-C')
    .option('--allow-other', 'let other users in')
    .option(
      '--guest <disk=guest>',
      'whose disk it is: DISK=bhyve:VMNAME, DISK=qmp:SOCKET or DISK=none; left out: the bhyve VM of that name, when there is one',
      guestArgument,
    )
    .option(
      '--attached <disk>',
      'its guest has the qcow2 file itself open: only read it, and have the guest take checkpoints; found out where the file is locked',
      diskArgument,
    )
    .option('--guest-timeout <seconds>', 'for a checkpoint of a guest', countArgument(1), DEFAULT_GUEST_TIMEOUT)
    .option('--guest-config <file>', "the guest's command line, or a file of bhyve_config(5), for restore-command")
    .option('--overlay-dir <dir>', 'where new overlays go; left out: beside the image', folderArgument)
    .option('--backing-root <dir>', 'one more folder with images that may be built on these', foldersArgument)
    .option('--threads <n>', 'threads that serve reads and writes', countArgument(1), defaultThreads)
    .option(
      '--poll <microseconds>',
      'how long one of them stays awake for the next request; 0 saves power and costs speed',
      countArgument(0),
      defaultPoll,
    )
    .option('--cache <size>', 'memory for the tables of each disk, such as 32M', sizeArgument)
    .option('--replace', 'first end what vdskfs has mounted there, or left there when it died')
    .addOption(new Option('--driver <name>', 'how to talk to the kernel').choices(driverNames).default('native'))
    .addOption(
      new Option('--log-level <level>', 'how much to log').choices(Object.keys(logLevels)).default('error' as LogLevel),
    )
    .addHelpText('after', example('vdskfs mount vm1.qcow2 /mnt/vms', 'vdskfs mount --read-only /var/vms /mnt/vms'))
    .action(mount);
}

async function mount(paths: readonly string[], flags: MountFlags, command: Command): Promise<void> {
  const mountpoint = paths.at(-1);
  if (paths.length < 2 || mountpoint === undefined) {
    command.error('vdskfs: give at least one image or folder, and last the directory to mount on', {
      exitCode: exitStatus.USAGE,
    });
  }
  const sources = paths.slice(0, -1);
  const guests = flags.guest ?? new Map();
  const attached = flags.attached ?? new Set<string>();
  const said = new Set([...guests.keys(), ...attached]);
  if (said.size > 0) {
    const { disksToMount } = await import('./images.ts');
    const names = (await disksToMount(sources)).map(({ name }) => name);
    const stranger = [...said].find((name) => !names.includes(name));
    if (stranger !== undefined) {
      command.error(`vdskfs: no disk ${stranger} is mounted; there are ${names.join(', ')}`, {
        exitCode: exitStatus.USAGE,
      });
    }
  }
  const detached = isDetachedServer();
  if (!flags.foreground && !detached) return startDetached(mountpoint);
  setLogLevel(flags.logLevel);
  const { runServer } = await import('./server.ts'); // the engine is a lot to load for --help
  await runServer({
    sources,
    mountpoint,
    driver: flags.driver,
    readOnly: flags.readOnly ?? false,
    allowOther: flags.allowOther ?? false,
    replace: flags.replace ?? false,
    threads: flags.threads,
    pollMicroseconds: flags.poll,
    cacheBytes: flags.cache,
    backingRoots: flags.backingRoot ?? [],
    overlayFolder: flags.overlayDir,
    guests,
    attached,
    guestTimeoutMs: flags.guestTimeout * 1000,
    guestConfig: flags.guestConfig === undefined ? undefined : resolve(flags.guestConfig),
    detached,
  });
}
