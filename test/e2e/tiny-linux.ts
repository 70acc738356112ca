/**
 * A Linux for the tests' QEMU: Debian's kernel, busybox, and an init of a few lines that counts. Each number is written
 * to the disk with direct I/O and then to the console; before, the disk is read and compared with what memory says. A
 * guest agent of a few lines more lets it stand still. What it is made of lies in build/test-guest
 * (bin/fetch-test-guest).
 */
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { qmpArgument } from '../guest/qemu/real-qemu.ts';
import { runOk } from './run.ts';

const tree = fileURLToPath(new URL('../..', import.meta.url));
const parts = join(tree, 'build', 'test-guest');

/** Modules in an order in which each finds what it needs. */
const MODULES = [
  ...['virtio_ring', 'virtio', 'virtio_pci_legacy_dev', 'virtio_pci_modern_dev', 'virtio_pci'],
  ...['virtio_blk', 'virtio_console'],
];

const INIT = `#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for module in ${MODULES.join(' ')}; do insmod /$module.ko; done
# The port comes some time after its driver; opened before, it would become a plain file for good. It stays open, as with
# the real agent: closing it would throw away what has just arrived.
agent() {
  while :; do
    while read -r request; do
      case $request in
        *guest-sync-delimited*) id=\${request##*:}; printf '\\377{"return": %s}\\n' \${id%%\\}*} ;;
        *guest-fsfreeze-freeze*) touch /freeze; until [ -e /frozen ]; do usleep 1000; done; echo '{"return": 1}' ;;
        *guest-fsfreeze-thaw*) rm -f /freeze; echo '{"return": 1}' ;;
      esac
    done
    usleep 10000
  done
}
{ until [ -c /dev/vport0p1 ]; do usleep 10000; done; agent <>/dev/vport0p1 >&0; } &

memory=0
while :; do
  if [ -e /freeze ]; then
    echo frozen
    touch /frozen
    while [ -e /freeze ]; do usleep 1000; done
    rm /frozen
    echo thawed
  fi
  disk=$(dd if=/dev/vda bs=512 count=1 iflag=direct 2>/dev/null | tr -d ' \\0')
  [ "\${disk:-0}" = $memory ] || echo "disagree: disk $disk, memory $memory"
  memory=$((memory + 1))
  printf '%-512s' $memory | dd of=/dev/vda bs=512 count=1 oflag=direct conv=notrunc 2>/dev/null
  echo "counter: $memory"
done
`;

const MEMORY_MIB = 96;
/** Booting takes 3 s on a machine that does nothing else; KVM is not used, since it may be there and not work. */
const WAIT_MS = 60_000;

/** One file of a cpio archive in the new ASCII format, which the kernel unpacks (Documentation/driver-api/early-userspace). */
function cpioEntry(name: string, mode: number, contents: Uint8Array): Buffer {
  const path = Buffer.from(`${name}\0`);
  // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
  const fields = [0, mode, 0, 0, 1, 0, contents.length, 0, 0, 0, 0, path.length, 0];
  const header = `070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}`;
  const padding = (bytes: number) => Buffer.alloc((4 - (bytes % 4)) % 4);
  return Buffer.concat([
    Buffer.from(header),
    path,
    padding(header.length + path.length),
    contents,
    padding(contents.length),
  ]);
}

function initramfs(): Buffer {
  const FILE = 0o100755;
  const DIRECTORY = 0o040755;
  const none = new Uint8Array();
  return Buffer.concat([
    cpioEntry('dev', DIRECTORY, none),
    cpioEntry('bin', DIRECTORY, none),
    cpioEntry('bin/busybox', FILE, readFileSync(join(parts, 'busybox'))),
    cpioEntry('init', FILE, Buffer.from(INIT)),
    ...readdirSync(parts)
      .filter((name) => name.endsWith('.ko'))
      .map((name) => cpioEntry(name, FILE, readFileSync(join(parts, name)))),
    cpioEntry('TRAILER!!!', 0, none),
  ]);
}

/** QEMU's arguments for a guest on `disk`; console and sockets lie in `directory`. */
export async function tinyLinux(directory: string, name: string, disk: string): Promise<readonly string[]> {
  if (!existsSync(join(parts, 'complete'))) await runOk(join(tree, 'bin', 'fetch-test-guest'), []);
  const archive = join(directory, 'initramfs');
  writeFileSync(archive, initramfs());
  return [
    ...['-name', name, '-accel', 'tcg', '-machine', 'pc', '-smp', '1', '-m', `${MEMORY_MIB}`],
    ...['-nodefaults', '-no-user-config', '-display', 'none', '-qmp', qmpArgument(directory)],
    ...['-kernel', join(parts, 'vmlinuz'), '-initrd', archive],
    ...['-append', 'console=ttyS0 quiet nokaslr mitigations=off tsc=reliable no_timer_check pci=conf1 noapic'],
    ...['-chardev', `file,id=console,path=${consoleFile(directory)},append=on`, '-serial', 'chardev:console'],
    ...['-drive', `file=${disk},format=raw,if=virtio,cache=writeback`],
    ...['-chardev', `socket,id=agent,path=${join(directory, 'agent.sock')},server=on,wait=off`],
    ...['-device', 'virtio-serial-pci', '-device', 'virtserialport,chardev=agent,name=org.qemu.guest_agent.0'],
  ];
}

const consoleFile = (directory: string): string => join(directory, 'console');

/** What such a guest has written to its console. */
export class GuestConsole {
  readonly #file: string;
  #from = 0;

  constructor(directory: string) {
    this.#file = consoleFile(directory);
  }

  /** Look only at what comes from now on. */
  fromHere(): void {
    this.#from = this.#all().length;
  }

  text(): string {
    return this.#all().slice(this.#from);
  }

  /** The numbers so far, in the order they came; not of a line that has begun before. */
  counters(): number[] {
    return [...this.text().matchAll(/^counter: (\d+)\r?\n/gm)].map(([, count]) => Number(count));
  }

  /** Wait until there are so many numbers. @returns the last one */
  async waitFor(count: number): Promise<number> {
    await this.#until(() => this.counters().length >= count);
    return this.counters().at(-1) as number;
  }

  waitForText(expected: RegExp): Promise<void> {
    return this.#until(() => expected.test(this.text()));
  }

  async #until(there: () => boolean): Promise<void> {
    for (const deadline = Date.now() + WAIT_MS; !there(); await sleep(20)) {
      if (Date.now() > deadline) throw new Error(`the guest did not go on:\n${this.text().slice(-2000)}`);
    }
  }

  #all(): string {
    return existsSync(this.#file) ? readFileSync(this.#file, 'latin1') : '';
  }
}
