/** control: write one command, read its answer. */
import { FsError } from '../errors.ts';
import type { AttributeChange, Attributes, Caller, FileNode, OpenFile } from '../fuse/filesystem.ts';
import { seekSolid } from './byte-range.ts';
import { runCommand } from './commands.ts';
import type { MountedDisk } from './mounted-disk.ts';
import { fileAttributes, LASTING_MS, refuseOwnership } from './node.ts';

/** The longest command: two names of 255 bytes fit many times. */
const COMMAND_BYTES = 64 * 1024;

const answerBytes = (sentence: string): Buffer => Buffer.from(sentence === '' ? '' : `${sentence}\n`);

export class ControlFile implements FileNode {
  readonly kind = 'file';
  readonly ino: number;
  readonly attributesValidMs = 0;
  readonly entryValidMs = LASTING_MS;
  readonly #mounted: MountedDisk;

  constructor(ino: number, mounted: MountedDisk) {
    this.ino = ino;
    this.#mounted = mounted;
  }

  async attributes(): Promise<Attributes> {
    const size = answerBytes(this.#mounted.lastAnswer).length;
    return fileAttributes({ permissions: 0o644, timeMs: this.#mounted.disk.modifiedMs() }, size, 0);
  }

  /** A shell's `>` truncates first: accepted, without effect. */
  setAttributes(change: AttributeChange, _caller: Caller): Promise<void> {
    return this.#mounted.attempt(async () => refuseOwnership(change, `${this.#mounted.disk.name}/control`));
  }

  async open(_flags: number, _caller: Caller): Promise<OpenFile> {
    return new OpenControl(this.#mounted);
  }
}

class OpenControl implements OpenFile {
  readonly slot = undefined;
  readonly caching = 'direct';
  readonly #mounted: MountedDisk;
  /** Answer to this file's last command, or the disk's when this file was first read; undefined before both. */
  #answer: Buffer | undefined;
  /**
   * File offset behind the last command. A shell that writes and reads through one descriptor reads on from there, so
   * the answer begins there if the first read comes there, and at 0 for all others.
   */
  #commandEnd = 0;
  #origin: number | undefined;

  constructor(mounted: MountedDisk) {
    this.#mounted = mounted;
  }

  async read(offset: number, size: number): Promise<Uint8Array> {
    this.#answer ??= answerBytes(this.#mounted.lastAnswer);
    this.#origin ??= offset === this.#commandEnd ? offset : 0;
    const at = offset - this.#origin;
    return at < 0 ? new Uint8Array() : this.#answer.subarray(at, at + size);
  }

  async write(offset: number, data: Uint8Array, _sync: boolean, { signal }: Caller): Promise<number> {
    this.#commandEnd = offset;
    try {
      this.#answer = answerBytes(await runCommand(this.#mounted, this.#commandIn(data), signal));
      this.#commandEnd = offset + data.length;
    } catch (error) {
      // A write that fails leaves the file's offset where it was.
      this.#answer = answerBytes(this.#mounted.lastAnswer);
      throw error;
    } finally {
      this.#origin = undefined;
    }
    return data.length;
  }

  async seek(offset: number, whence: number): Promise<number> {
    return seekSolid(offset, whence, (this.#answer ?? answerBytes(this.#mounted.lastAnswer)).length);
  }

  async allocate(): Promise<void> {
    throw new FsError('ENOTSUP', 'control takes commands, no space.');
  }

  async flush(): Promise<void> {}
  async sync(): Promise<void> {}
  async release(): Promise<void> {}

  #commandIn(data: Uint8Array): string {
    if (data.length > COMMAND_BYTES) {
      throw this.#mounted.report(new FsError('EINVAL', `A command has at most ${COMMAND_BYTES} bytes.`));
    }
    try {
      return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(data);
    } catch (cause) {
      throw this.#mounted.report(new FsError('EINVAL', 'A command is written in UTF-8.', { cause }));
    }
  }
}
