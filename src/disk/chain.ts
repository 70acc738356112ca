/**
 * A chain of open images as plain data, and how a thread makes its own objects over it. Layers come and go while views
 * are open; a thread has one object for each, which every view of it uses, and follows by attaching the views anew.
 */
import { type Backing, Image, type SharedImage } from '../qcow2/image.ts';
import { imageBacking, rawBacking } from '../qcow2/layer.ts';
import { HostFile, type SharedFile } from '../storage/host-file.ts';
import { attachRun, type SharedRun } from './frozen-run.ts';

interface SharedFileLayer {
  /** Unique in this process: another one when the file is opened anew. */
  readonly id: number;
  readonly file: SharedFile;
  /** It and those below it that do not change are read as one. */
  readonly run?: SharedRun;
}

/** One image of a chain; plain data that can be posted to another thread. */
export type SharedLayer =
  | (SharedFileLayer & {
      readonly format: 'qcow2';
      readonly data: SharedFile | undefined;
      readonly image: SharedImage;
    })
  | (SharedFileLayer & { readonly format: 'raw' });

/** Top first. */
export type SharedChain = readonly SharedLayer[];

/** This thread's objects, by layer, as long as a view or a layer above uses them. */
const images = new Map<number, WeakRef<Image>>();
/** The same, by run. */
const runs = new Map<number, WeakRef<Backing>>();
/** This thread's slot in each image: an image that is attached again takes the one it had. */
const threadSlots = new Map<number, number>();

/** The top of a chain on this thread: an image, or a raw file. */
export type AttachedTop = { readonly image: Image } | { readonly image: undefined; readonly backing: Backing };

/** This thread's object over the top layer, with those below it as its backing, also where they were others before. */
export function attachChain(chain: SharedChain): AttachedTop {
  const top = chain[0];
  if (top === undefined) throw new Error('a chain has at least one layer');
  return attachTop(top, backingFrom(chain, 1));
}

/** The layers from `index` on as what is above reads them; undefined: there are none. */
function backingFrom(chain: SharedChain, index: number): Backing | undefined {
  const layer = chain[index];
  if (layer === undefined) return undefined;
  const { run } = layer;
  if (run === undefined) return backingOf(attachTop(layer, backingFrom(chain, index + 1)));
  const known = runs.get(run.id)?.deref();
  if (known !== undefined) return known;
  const end = index + run.count;
  const backing = attachRun(run, chain.slice(index, end), backingFrom(chain, end));
  runs.set(run.id, new WeakRef(backing));
  return backing;
}

function attachTop(layer: SharedLayer, below: Backing | undefined): AttachedTop {
  if (layer.format === 'raw') return { image: undefined, backing: rawBacking(HostFile.adopt(layer.file)) };
  const image = images.get(layer.id)?.deref() ?? attachImage(layer);
  image.backing = below;
  return { image };
}

export const backingOf = (top: AttachedTop): Backing =>
  top.image === undefined ? top.backing : imageBacking(top.image);

function attachImage(layer: SharedLayer & { format: 'qcow2' }): Image {
  const file = HostFile.adopt(layer.file);
  const data = layer.data === undefined ? file : HostFile.adopt(layer.data);
  const image = Image.attach(layer.image, file, data, undefined, threadSlots.get(layer.id));
  threadSlots.set(layer.id, image.thread);
  images.set(layer.id, new WeakRef(image));
  return image;
}
