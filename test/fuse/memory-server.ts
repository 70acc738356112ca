/** Process that mounts a MemoryFileSystem and takes commands over its IPC channel; see mounted-memory.ts. */

import type { Driver } from '../../src/fuse/driver.ts';
import { mountFuseNative } from '../../src/fuse/fuse-native-driver.ts';
import { mountNative } from '../../src/fuse/native-driver.ts';
import { counter, makeMemoryDisk } from './memory-disk.ts';
import { MemoryFile, MemoryFileSystem } from './memory-file-system.ts';
import type { FromServer, ServerOptions, ToServer } from './mounted-memory.ts';

const options: ServerOptions = JSON.parse(process.argv[2] as string);
const drivers: Record<ServerOptions['driver'], Driver> = { native: mountNative, 'fuse-native': mountFuseNative };

const threadModule = options.dataPlane === 'broken' ? './absent.js' : './memory-thread.js';
const disk = makeMemoryDisk();
const fileSystem = new MemoryFileSystem(
  disk,
  options.dataPlane
    ? { entry: new URL(threadModule, import.meta.url), attach: () => ({ plane: disk, transfer: [] }) }
    : undefined,
);
const send = (message: FromServer): void => {
  process.send?.(message);
};

try {
  const mounted = await drivers[options.driver](fileSystem, options);
  send({ kind: 'mounted', capabilities: mounted.capabilities });
  let answered = Promise.resolve();
  process.on('message', (command: ToServer) => {
    answered = obey(command, () => mounted.unmount());
  });
  await mounted.ended;
  await answered;
  send({ kind: 'ended', openFiles: fileSystem.openFiles });
} catch (error) {
  const { errno, message } = error as { errno?: string; message: string };
  send({ kind: 'refused', errno: errno ?? 'none', message });
}
// Nothing else may keep the process alive now.
process.disconnect();

async function obey(command: ToServer, unmount: () => Promise<void>): Promise<void> {
  try {
    send({ kind: 'answer', value: await answer(command, unmount) });
  } catch (error) {
    const { errno, message } = error as { errno?: string; message: string };
    send({ kind: 'refused', errno: errno ?? 'none', message });
  }
}

async function answer(command: ToServer, unmount: () => Promise<void>): Promise<number> {
  switch (command.kind) {
    case 'unmount':
      await unmount();
      return 0;
    case 'counter':
      return Atomics.load(new Int32Array(disk.counters), counter[command.name]);
    case 'openFiles':
      return fileSystem.openFiles;
    case 'waiting':
      return fileSystem.waiting;
    case 'rewrite': {
      const file = fileSystem.root.entries.get(command.name);
      if (!(file instanceof MemoryFile)) throw new Error(`${command.name} is no such file`);
      file.contents = Buffer.from(command.text);
      if (command.notify) fileSystem.notifier?.invalidateNode(file.ino);
      return 0;
    }
    case 'drop': {
      fileSystem.root.entries.delete(command.name);
      fileSystem.notifier?.invalidateEntry(fileSystem.root.ino, command.name);
      return 0;
    }
    case 'block': {
      // What a long synchronous computation does to the event loop.
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, command.ms);
      return 0;
    }
  }
}
