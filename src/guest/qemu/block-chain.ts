/** The disk in QEMU that has a certain image in its chain, and the chain's files, as query-block tells. */
import { realpath } from 'node:fs/promises';
import { resolve } from 'node:path';
import { FsError } from '../../errors.ts';
import { asArray, asObject, asText, isObject, type JsonObject } from './json-fields.ts';
import { processDirectory } from './process.ts';
import type { QmpClient } from './qmp-client.ts';

/** One image of a chain that QEMU has open. */
export interface BlockLayer {
  /** Absolute, links resolved. */
  readonly file: string;
  readonly nodeName: string;
  /** Names of its internal snapshots. */
  readonly snapshots: readonly string[];
}

/** Deeper ones are refused when they are opened; this one claims to be open. */
const CHAIN_LAYERS = 200;

/**
 * The chain that `image` is a layer of, the active layer first.
 * @throws FsError ENXIO where QEMU does not have the image open
 */
export async function blockChain(qmp: QmpClient, image: string): Promise<readonly BlockLayer[]> {
  const wanted = await realpath(image).catch(() => image);
  const directory = (await processDirectory(qmp.process)) ?? process.cwd();
  for (const listed of asArray(await qmp.execute('query-block'), 'query-block')) {
    const { inserted } = asObject(listed, 'a device');
    if (!isObject(inserted)) continue; // a drive without a medium
    const images = layersOf(inserted.image);
    const files = await Promise.all(images.map((one) => fileOf(one, directory)));
    if (!files.includes(wanted)) continue;
    const nodes = await nodesByFile(qmp, directory);
    return files.map((file, depth) => ({
      file,
      nodeName: depth === 0 ? asText(inserted['node-name'], 'node-name') : onlyNode(nodes, file),
      snapshots: snapshotNames(images[depth] as JsonObject),
    }));
  }
  throw new FsError('ENXIO', `QEMU at '${qmp.path}' does not have '${image}' open: see that it is this guest's disk.`);
}

function layersOf(image: unknown): JsonObject[] {
  const layers: JsonObject[] = [];
  for (let next = image; isObject(next) && layers.length <= CHAIN_LAYERS; next = next['backing-image']) {
    layers.push(next);
  }
  return layers;
}

function snapshotNames(image: JsonObject): string[] {
  return image.snapshots === undefined
    ? []
    : asArray(image.snapshots, 'snapshots').map((one) => asText(asObject(one, 'a snapshot').name, 'name'));
}

/** Where a name alone says too little, QEMU writes the node's options: `json:{"driver":"qcow2","file":{…}}`. */
async function fileOf(image: JsonObject, directory: string): Promise<string> {
  let name = asText(image.filename, 'filename');
  if (name.startsWith('json:')) {
    let options: unknown;
    try {
      options = JSON.parse(name.slice('json:'.length));
    } catch {
      return name;
    }
    while (isObject(options) && isObject(options.file)) options = options.file;
    if (!isObject(options) || typeof options.filename !== 'string') return name;
    name = options.filename;
  }
  const path = resolve(directory, name.replace(/^file:/, ''));
  return realpath(path).catch(() => path);
}

/** Format nodes by the file they read; the nodes below them, of the file itself, are left out. */
async function nodesByFile(qmp: QmpClient, directory: string): Promise<ReadonlyMap<string, readonly string[]>> {
  const nodes = new Map<string, string[]>();
  const listed = asArray(await qmp.execute('query-named-block-nodes', { flat: true }), 'query-named-block-nodes');
  for (const one of listed) {
    const { drv, image, 'node-name': name } = asObject(one, 'a node');
    if (drv !== 'qcow2' && drv !== 'raw') continue;
    const file = await fileOf(asObject(image, 'image'), directory);
    nodes.set(file, [...(nodes.get(file) ?? []), asText(name, 'node-name')]);
  }
  return nodes;
}

function onlyNode(nodes: ReadonlyMap<string, readonly string[]>, file: string): string {
  const [name, ...others] = nodes.get(file) ?? [];
  if (name === undefined) throw new FsError('EIO', `QEMU reads '${file}', but has no node of it.`);
  if (others.length > 0) {
    throw new FsError(
      'EBUSY',
      `QEMU has '${file}' open as ${[name, ...others].join(' and ')}: it is part of several disks.`,
    );
  }
  return name;
}
