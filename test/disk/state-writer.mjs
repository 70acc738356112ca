/** A thread that writes every n-th piece of a guest's state, as told in `workerData`; piece k is filled with k % 251 + 1. */
import { workerData } from 'node:worker_threads';
import { attachContents } from '../../dist/disk/attach-contents.js';

const { shared, thread, threads, pieces, pieceBytes } = workerData;
const contents = attachContents(shared);
const piece = new Uint8Array(pieceBytes);
for (let index = thread; index < pieces; index += threads) {
  piece.fill((index % 251) + 1);
  contents.write(piece, 0, pieceBytes, index * pieceBytes);
}
