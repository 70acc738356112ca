/** Each image of the corpus reads through a mount as QEMU reads it, live and every snapshot, and stays as it is. */
import { open } from 'node:fs/promises';
import { basename } from 'node:path';
import { describe, expect, it } from 'vitest';
import { corpusOf, referenceDisk, referenceSnapshot } from './corpus.ts';
import { expectFile, listCheckpoints } from './corpus-compare.ts';
import { hashes, snapshotsOf } from './corpus-qemu.ts';
import { driver, withMount } from './mount.ts';
import { withDirectory } from './run.ts';

describe.each(corpusOf(driver))('$name: $what', (variant) => {
  it('reads as qemu-img reads it, and a read-only mount changes no byte of it', () =>
    withDirectory(async (directory) => {
      const image = variant.make(directory);
      const before = hashes(directory);
      const disk = referenceDisk(variant, image);
      const wanted = snapshotsOf(image);
      const snapshots = new Map(wanted.map(({ id }) => [id, referenceSnapshot(variant, image, id)]));

      await withMount(image, { args: ['--read-only'] }, async (tree) => {
        const name = basename(image, '.qcow2');
        const live = tree.path(name, 'disk.raw');
        await expectFile(live, disk, variant.sparse);
        await expect(open(live, 'r+')).rejects.toMatchObject({ code: expect.stringMatching(/^(EROFS|EACCES)$/) });

        const shown = await listCheckpoints(tree.path(name, 'snapshots'));
        expect(
          [...shown.values()].map(({ id, realName, vmStateSize }) => ({ id, realName, vmStateSize })).sort(byId),
        ).toEqual(wanted.map((it) => ({ id: it.id, realName: it.name, vmStateSize: it['vm-state-size'] })).sort(byId));
        for (const [directoryName, { id, name: infoName, virtualSize }] of shown) {
          const model = snapshots.get(id);
          if (!model) throw new Error(`${directoryName} has ID ${id}, which qemu-img does not list`);
          expect({ infoName, virtualSize }).toEqual({ infoName: directoryName, virtualSize: model.size });
          await expectFile(tree.path(name, 'snapshots', directoryName, 'disk.raw'), model, variant.sparse);
        }
      });
      expect(hashes(directory)).toEqual(before);
    }));
});

const byId = (a: { id: string }, b: { id: string }): number => Number(a.id) - Number(b.id);
