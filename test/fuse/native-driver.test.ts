import { execFileSync } from 'node:child_process';
import { afterEach, expect, it } from 'vitest';
import { MountedMemory } from './mounted-memory.ts';

let m: MountedMemory | undefined;
afterEach(async () => {
  await m?.remove();
});
it('smoke', async () => {
  m = await MountedMemory.start({ driver: (process.env.DRV ?? 'native') as 'native' });
  console.log(
    execFileSync(
      'sh',
      [
        '-c',
        `cd ${m.mountpoint} && ls -la && cat hello.txt && dd if=/dev/urandom of=disk.raw bs=1M count=40 conv=notrunc,fsync && md5sum disk.raw && stat disk.raw && df . && mkdir a && mv a b && rmdir b && ls many | wc -l; grep fuse /proc/mounts`,
      ],
      { encoding: 'utf8' },
    ),
  );
  await m.ask({ kind: 'unmount' });
  console.log(await m.ended);
});
