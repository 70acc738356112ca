/** The gate closes the image to writes for the moments that need it still; reads go on. */
import type { Image } from './image.ts';
import { word } from './image.ts';

/** @returns false when the gate is closed: the write must come again later */
export function enterWrite(image: Image): boolean {
  image.lock();
  const open = image.words[word.GATE] === 0;
  if (open) image.words[word.WRITERS] = (image.words[word.WRITERS] as number) + 1;
  image.unlock();
  return open;
}

export function leaveWrite(image: Image): void {
  image.lock();
  const left = (image.words[word.WRITERS] as number) - 1;
  image.words[word.WRITERS] = left;
  const awaited = left === 0 && image.words[word.GATE] !== 0;
  image.unlock();
  // Whoever closes the gate later finds no writer, and does not wait.
  if (awaited) Atomics.notify(image.words, word.WRITERS);
}

/** Close the gate and wait until no write is running: as long as one host write takes. It is open when all who closed it have opened it. */
export function closeGate(image: Image): void {
  const { words } = image;
  image.lock();
  words[word.GATE] = (words[word.GATE] as number) + 1;
  image.unlock();
  for (;;) {
    const running = Atomics.load(words, word.WRITERS);
    if (running === 0) return;
    Atomics.wait(words, word.WRITERS, running);
  }
}

export function openGate(image: Image): void {
  image.lock();
  const left = (image.words[word.GATE] as number) - 1;
  image.words[word.GATE] = left;
  image.unlock();
  if (left === 0) for (const goOn of image.gateWaiters.splice(0)) goOn();
}

/** Resolves when the gate is open. On the thread that closes and opens it. */
export async function gateOpen(image: Image): Promise<void> {
  if (Atomics.load(image.words, word.GATE) === 0) return;
  await new Promise<void>((resolve) => image.gateWaiters.push(resolve));
}
