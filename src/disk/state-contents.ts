/** A file of guest state that is being written, over one thread's image object. */
import type { Image } from '../qcow2/image.ts';
import { readState, type StateArea, setStateSize, writeState, zeroState } from '../qcow2/vm-state.ts';
import { search } from './contents.ts';
import type { StateContents } from './disk.ts';

export class WrittenState implements StateContents {
  readonly #image: Image;
  readonly #area: StateArea;

  constructor(image: Image, area: StateArea) {
    this.#image = image;
    this.#area = area;
  }

  size(): number {
    return this.#area.size();
  }

  read(target: Uint8Array, at: number, length: number, offset: number): void {
    readState(this.#image, this.#area, target, at, length, offset);
  }

  write(source: Uint8Array, at: number, length: number, offset: number): boolean {
    writeState(this.#image, this.#area, source, at, length, offset);
    return true;
  }

  discard(offset: number, length: number): boolean {
    zeroState(this.#image, this.#area, offset, length);
    return true;
  }

  writeZeroes(offset: number, length: number): boolean {
    return this.discard(offset, length);
  }

  setSize(bytes: number): void {
    setStateSize(this.#image, this.#area, bytes);
  }

  /** Nothing: a state is durable when its checkpoint is published, and not there before. */
  flush(): void {}

  nextData(offset: number): number {
    return search(this.#image, this.#area.table, this.#area.shared.base, this.size(), offset, true);
  }

  nextHole(offset: number): number {
    return search(this.#image, this.#area.table, this.#area.shared.base, this.size(), offset, false);
  }
}
