/** External checkpoints with the state of a guest, between their instant and their being seen. */
import { existsSync, readFileSync, statSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { attachContents } from '../../src/disk/attach-contents.ts';
import { openDisk } from '../../src/disk/open-disk.ts';
import { Died, dyingAt } from './dying-process.ts';
import { OverlayDisk } from './overlay-disk.ts';

const MIB = 2 ** 20;
const guest = {
  kind: 'bhyve',
  name: 'vm1',
  version: '1',
  hostRelease: undefined,
  argv: ['bhyve', '-m', '1G', 'x'.repeat(600)],
} as const;

describe('a pending external checkpoint', () => {
  it('keeps the state files beside its overlay, sparse, and is found again with them', async () => {
    await using test = new OverlayDisk();
    await test.open();
    test.write(1, 0, 1000);
    const instant = test.live();
    const pending = await test.disk.freeze('external', 'a');
    test.write(2, 0, 1000);
    expect(test.overlays).toEqual([]);
    {
      using state = pending.createState('state');
      const other = attachContents(state.shared);
      const bytes = new Uint8Array(MIB);
      bytes.fill(7, MIB / 2, MIB / 2 + 10);
      other.write(bytes, 0, MIB, 3 * MIB);
      state.contents.write(bytes.fill(0), 0, MIB, 8 * MIB);
      expect(state.contents.size()).toBe(9 * MIB);
    }
    pending.createState('state.meta').contents.write(Buffer.from('{}'), 0, 2, 0);
    await pending.publish({ consistency: 'memory', guest });
    const stateFiles = [
      { name: 'state', bytes: 9 * MIB },
      { name: 'state.meta', bytes: 2 },
    ];
    await test.open();
    const found = test.checkpoint('a');
    expect(found).toMatchObject({ consistency: 'memory', stateFiles });
    expect(test.disk.details(found).guest).toMatchObject({ kind: 'bhyve', name: 'vm1', argv: guest.argv });
    expect(test.contents('a')).toBe(instant);
    const path = test.at('a.qcow2.state');
    expect(statSync(path).size).toBe(9 * MIB);
    expect(statSync(path).blocks * 512).toBeLessThan(64 * 1024);
    expect(readFileSync(path).readUInt8(3.5 * MIB)).toBe(7);
    await test.disk.renameCheckpoint(found, 'b');
    expect(existsSync(test.at('b.qcow2.state'))).toBe(true);
    await test.disk.deleteCheckpoint(test.checkpoint('b'));
    expect(test.files).toEqual(['vm1.qcow2']);
  });

  it.each([true, false])('leaves no trace when it is abandoned, with writes since: %s', async (written) => {
    await using test = new OverlayDisk();
    await test.open();
    test.write(1, 0, 1000);
    const pending = await test.disk.freeze('external', 'a');
    pending.createState('state').contents.write(new Uint8Array(10).fill(1), 0, 10, 0);
    if (written) test.write(2, 500, 70_000);
    const live = test.live();
    await pending.abandon();
    expect(test.files).toEqual(['vm1.qcow2']);
    expect(test.live()).toBe(live);
    test.write(3, 0, 10);
    await test.open();
    expect(test.overlays).toEqual([]);
  });

  it.each([true, false])('is no checkpoint after a crash, with writes since: %s', async (written) => {
    await using test = new OverlayDisk();
    let live = '';
    await dyingAt(Number.POSITIVE_INFINITY, async () => {
      const disk = await openDisk(test.image, { readOnly: false });
      const pending = await disk.freeze('external', 'a');
      pending.createState('state').contents.write(new Uint8Array(10).fill(1), 0, 10, 0);
      using view = disk.openLive();
      if (written) view.contents.write(new Uint8Array(MIB / 2).fill(2), 0, MIB / 2, 0);
      view.contents.flush();
      throw new Died('here');
    }).catch((error) => {
      if (!(error instanceof Died)) throw error;
    });
    await test.open();
    live = test.live();
    expect(test.overlays).toEqual([]);
    expect(test.files).toEqual(written ? ['vm1.qcow2', 'vm1~~1.qcow2'] : ['vm1.qcow2']);
    await test.take('b');
    await test.disk.deleteCheckpoint(test.checkpoint('b'));
    expect(test.files).toEqual(['vm1.qcow2']);
    expect(test.live()).toBe(live);
  });
});
