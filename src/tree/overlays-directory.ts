/** overlays/: external checkpoints. None can be taken yet; the folder stands where they will be. */
import type { Attributes, DirectoryEntry, Node } from '../fuse/filesystem.ts';
import { overlaysMissing } from './commands.ts';
import { Directory, directoryAttributes, type Place } from './node.ts';

export class OverlaysDirectory extends Directory {
  readonly #timeMs: () => number;

  constructor(place: Place, parentIno: number, timeMs: () => number) {
    super(place, parentIno);
    this.#timeMs = timeMs;
  }

  override async attributes(): Promise<Attributes> {
    return directoryAttributes({ permissions: 0o755, timeMs: this.#timeMs() }, 0);
  }

  override async lookup(name: string): Promise<Node> {
    throw this.absent(name);
  }

  override async list(): Promise<readonly DirectoryEntry[]> {
    return [];
  }

  override async makeDirectory(): Promise<Node> {
    throw this.place.report(overlaysMissing());
  }
}
