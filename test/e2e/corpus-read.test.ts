/** Each image of the corpus reads through a mount as QEMU reads it, live and every snapshot, and stays as it is. */
import { open } from 'node:fs/promises';
import { basename } from 'node:path';
import { describe, expect, it } from 'vitest';
import { corpusOf, referenceDisk, referenceSnapshot } from './corpus.ts';
import { type CheckpointInfo, expectFile, listCheckpoints } from './corpus-compare.ts';
import type { SparseModel } from './corpus-model.ts';
import { backingFiles, hashes, snapshotsOf } from './corpus-qemu.ts';
import { driver, withMount } from './mount.ts';
import { withDirectory } from './run.ts';

describe.each(corpusOf(driver))('$name: $what', (variant) => {
  it('reads as qemu-img reads it, and a read-only mount changes no byte of it', () =>
    withDirectory(async (directory) => {
      const image = variant.make(directory);
      const before = hashes(directory);
      const disk = referenceDisk(variant, image);
      const kept = [image, ...backingFiles(image)].flatMap((layer) =>
        snapshotsOf(layer).map(({ id, name, 'vm-state-size': vmStateSize }) => ({
          info: { layer: basename(layer), id, realName: name, vmStateSize },
          model: referenceSnapshot(variant, layer, id),
        })),
      );

      await withMount(image, { args: ['--read-only'] }, async (tree) => {
        const name = basename(image, '.qcow2');
        const live = tree.path(name, 'disk.raw');
        await expectFile(live, disk, variant.sparse);
        await expect(open(live, 'r+')).rejects.toMatchObject({ code: expect.stringMatching(/^(EROFS|EACCES)$/) });

        const shown = await listCheckpoints(tree.path(name, 'snapshots'));
        expect([...shown.values()].map(told).sort()).toEqual(kept.map(({ info }) => told(info)).sort());
        for (const [directoryName, info] of shown) {
          const model = kept.find((one) => told(one.info) === told(info))?.model as SparseModel;
          const { name: infoName, virtualSize } = info;
          expect({ infoName, virtualSize }).toEqual({ infoName: directoryName, virtualSize: model.size });
          await expectFile(tree.path(name, 'snapshots', directoryName, 'disk.raw'), model, variant.sparse);
        }
      });
      expect(hashes(directory)).toEqual(before);
    }));
});

const told = ({ layer, id, realName, vmStateSize }: Omit<CheckpointInfo, 'name' | 'virtualSize'>): string =>
  JSON.stringify([layer, id, realName, vmStateSize]);
