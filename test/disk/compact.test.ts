import { statSync } from 'node:fs';
import { expect, it } from 'vitest';
import { OverlayDisk, qemuCheck } from './overlay-disk.ts';

const MiB = 2 ** 20;

it('compacting lets others come between, and goes on behind them', async () => {
  await using test = new OverlayDisk(16 * MiB, 512);
  const disk = await test.open();
  test.write(1, 0, 8 * MiB);
  const low = await disk.takeCheckpoint('low');
  test.write(2, 0, 8 * MiB);
  await disk.deleteCheckpoint(low);
  const live = test.live();
  const order: string[] = [];
  const compacted = disk.compact().then((report) => {
    order.push('compacted');
    return report;
  });
  await disk.prepareFreeze();
  await disk.takeCheckpoint('between');
  order.push('taken');
  const { bytesBefore, bytesAfter } = await compacted;
  expect(order).toEqual(['taken', 'compacted']);
  expect(bytesAfter).toBeLessThan(bytesBefore - 6 * MiB);
  expect(statSync(test.image).size).toBe(bytesAfter);
  expect(test.live()).toBe(live);
  expect(test.contents('between')).toBe(live);
  await test.close();
  qemuCheck(test.image);
});
