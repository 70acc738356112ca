/** Checkpoints of an image that QEMU itself has open: QEMU takes and deletes them, by its own commands. */
import { access, unlink } from 'node:fs/promises';
import { basename, dirname, join, relative } from 'node:path';
import { FsError } from '../../errors.ts';
import { codeOf, fsErrorFrom } from '../../os/errno.ts';
import type { AttachedCheckpoints } from '../guest.ts';
import { type BlockLayer, blockChain } from './block-chain.ts';
import { runJob } from './block-job.ts';
import type { Monitor } from './monitor.ts';
import { type QmpClient, QmpError } from './qmp-client.ts';

/** @param image the file that the guest was attached by: some layer of the disk's chain in QEMU */
export function attachedCheckpoints(monitor: Monitor, image: string): AttachedCheckpoints {
  return {
    take: (kind, name) =>
      monitor.use((qmp) => (kind === 'internal' ? takeInternal(qmp, image, name) : takeExternal(qmp, image, name))),
    delete: (kind, name, onProgress) =>
      monitor.use((qmp) =>
        kind === 'internal' ? deleteInternal(qmp, image, name) : deleteExternal(qmp, image, name, onProgress),
      ),
  };
}

async function takeInternal(qmp: QmpClient, image: string, name: string): Promise<void> {
  const [active] = await blockChain(qmp, image);
  await snapshotCommand(qmp, 'blockdev-snapshot-internal-sync', active, name);
}

async function deleteInternal(qmp: QmpClient, image: string, name: string): Promise<void> {
  const [active, ...below] = await blockChain(qmp, image);
  const holder = below.find(({ snapshots }) => snapshots.includes(name));
  if (holder !== undefined && !active?.snapshots.includes(name)) {
    const sentence = `The snapshot ${JSON.stringify(name)} is in '${holder.file}', which the guest has open for reading only: delete the external checkpoints above it first.`;
    throw new FsError('EBUSY', sentence);
  }
  await snapshotCommand(qmp, 'blockdev-snapshot-delete-internal-sync', active, name);
}

async function snapshotCommand(
  qmp: QmpClient,
  command: string,
  active: BlockLayer | undefined,
  name: string,
): Promise<void> {
  try {
    await qmp.execute(command, { device: active?.nodeName ?? '', name });
  } catch (error) {
    if (!(error instanceof QmpError)) throw error;
    if (/already exists/.test(error.message)) throw new FsError('EEXIST', error.message, { cause: error });
    if (/does not exist/.test(error.message)) throw new FsError('ENOENT', error.message, { cause: error });
    throw error;
  }
}

/** The files that the external checkpoint `name` of a disk may have: the second where the first belongs to another one. */
function overlayNames(image: string, name: string): readonly string[] {
  const disk = basename(image, '.qcow2');
  return [...(name.startsWith(`${disk}~`) ? [] : [`${name}.qcow2`]), `${disk}~${name}.qcow2`];
}

async function takeExternal(qmp: QmpClient, image: string, name: string): Promise<void> {
  const chain = await blockChain(qmp, image);
  const names = overlayNames(image, name);
  if (chain.some(({ file }) => names.includes(basename(file)))) {
    throw new FsError('EEXIST', `The disk has an external checkpoint ${JSON.stringify(name)} already.`);
  }
  const active = chain[0] as BlockLayer;
  const overlay = await unusedFile(dirname(active.file), names);
  const nodeName = `vdskfs-${Date.now().toString(36)}`;
  await qmp.execute('blockdev-snapshot-sync', {
    'node-name': active.nodeName,
    'snapshot-file': overlay,
    'snapshot-node-name': nodeName,
    format: 'qcow2',
    mode: 'absolute-paths',
  });
  // Relative, so that the chain can be moved as a folder; without it the chain is as good.
  const backing = basename(active.file);
  const relink = { device: nodeName, 'image-node-name': nodeName, 'backing-file': backing };
  await qmp.execute('change-backing-file', relink).catch((error) => {
    if (!(error instanceof QmpError)) throw error;
  });
}

/** @throws FsError EEXIST: QEMU would write over a file that is there */
async function unusedFile(folder: string, names: readonly string[]): Promise<string> {
  for (const name of names) {
    const path = join(folder, name);
    const error: unknown = await access(path).then(
      () => undefined,
      (failure) => failure,
    );
    if (codeOf(error) === 'ENOENT') return path;
    if (error !== undefined) throw fsErrorFrom(error, `cannot make '${path}'`);
  }
  throw new FsError(
    'EEXIST',
    `There are files ${names.map((name) => `'${join(folder, name)}'`).join(' and ')} already.`,
  );
}

/**
 * Merge the layer that the checkpoint created into the one below it, and remove its file. What the layers above and the
 * guest read stays as it is at every instant.
 */
async function deleteExternal(
  qmp: QmpClient,
  image: string,
  name: string,
  onProgress: (fraction: number) => void,
): Promise<void> {
  const chain = await blockChain(qmp, image);
  const names = overlayNames(image, name);
  const at = chain.findIndex(({ file }) => names.includes(basename(file)));
  const layer = chain[at];
  const below = chain[at + 1];
  if (layer === undefined || below === undefined) {
    throw new FsError('ENOENT', `The guest's disk has no external checkpoint ${JSON.stringify(name)}.`);
  }
  if (layer.snapshots.length > 0) {
    const held = layer.snapshots.map((one) => JSON.stringify(one)).join(', ');
    throw new FsError('EBUSY', `'${layer.file}' would vanish, and holds the snapshots ${held}: delete them first.`);
  }
  const above = chain[at - 1];
  await runJob(
    qmp,
    'block-commit',
    {
      device: (chain[0] as BlockLayer).nodeName,
      'base-node': below.nodeName,
      // The active layer is committed without these, and then left.
      ...(above === undefined
        ? {}
        : { 'top-node': layer.nodeName, 'backing-file': relative(dirname(above.file), below.file) }),
    },
    onProgress,
  );
  const rest = await blockChain(qmp, below.file);
  if (rest.some(({ file }) => file === layer.file)) {
    throw new FsError('EIO', `QEMU merged '${layer.file}', but has it open still: it stays.`);
  }
  try {
    await unlink(layer.file);
  } catch (error) {
    throw fsErrorFrom(error, `'${layer.file}' is merged, but cannot be removed`);
  }
}
