/** A chain of open images as plain data, and how a thread makes its own objects over it. */
import { type Backing, Image, type SharedImage } from '../qcow2/image.ts';
import { imageBacking, rawBacking } from '../qcow2/layer.ts';
import { HostFile, type SharedFile } from '../storage/host-file.ts';

/** One image of a chain; plain data that can be posted to another thread. */
export type SharedLayer =
  | {
      readonly format: 'qcow2';
      readonly file: SharedFile;
      readonly data: SharedFile | undefined;
      readonly image: SharedImage;
    }
  | { readonly format: 'raw'; readonly file: SharedFile };

/** Top first. */
export type SharedChain = readonly SharedLayer[];

/** This thread's object over the top image, with the images below it as its backing. */
export function attachChain(chain: SharedChain): Image {
  let backing: Backing | undefined;
  for (let index = chain.length - 1; index > 0; index--) {
    const layer = chain[index] as SharedLayer;
    backing =
      layer.format === 'raw' ? rawBacking(HostFile.adopt(layer.file)) : imageBacking(attachLayer(layer, backing));
  }
  const top = chain[0];
  if (top?.format !== 'qcow2') throw new Error('the top of a chain is a qcow2 image');
  return attachLayer(top, backing);
}

function attachLayer(layer: SharedLayer & { format: 'qcow2' }, backing: Backing | undefined): Image {
  const file = HostFile.adopt(layer.file);
  return Image.attach(layer.image, file, layer.data === undefined ? file : HostFile.adopt(layer.data), backing);
}
