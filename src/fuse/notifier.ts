import { Worker } from 'node:worker_threads';
import type { Notifier } from './filesystem.ts';
import { notifyInvalEntryOut, notifyInvalInodeOut, outHeader } from './structures.ts';

/** Codes of notifications (FUSE_NOTIFY_*), which stand in the place of a reply's error. */
const notifyCode = { INVAL_INODE: 2, INVAL_ENTRY: 3 } as const;

/** Attributes and every cached page of a node. */
export function encodeInvalInode(ino: number): Uint8Array {
  const bytes = outHeader.bytes + notifyInvalInodeOut.bytes;
  const message = new Uint8Array(bytes);
  outHeader.encode({ len: bytes, error: notifyCode.INVAL_INODE, unique: 0n }, message);
  // A length of 0 reaches to the end.
  return notifyInvalInodeOut.encode({ ino: BigInt(ino), off: 0n, len: 0n }, message, outHeader.bytes);
}

export function encodeInvalEntry(parentIno: number, name: string): Uint8Array {
  const nameBytes = Buffer.from(name);
  const nameAt = outHeader.bytes + notifyInvalEntryOut.bytes;
  const bytes = nameAt + nameBytes.length + 1; // and a NUL
  const message = new Uint8Array(bytes);
  outHeader.encode({ len: bytes, error: notifyCode.INVAL_ENTRY, unique: 0n }, message);
  notifyInvalEntryOut.encode({ parent: BigInt(parentIno), namelen: nameBytes.length }, message, outHeader.bytes);
  message.set(nameBytes, nameAt);
  return message;
}

/** Queues notifications for a thread of its own, which is started by the first of them. */
export class DeviceNotifier implements Notifier {
  readonly #fd: number;
  readonly #report: (error: unknown) => void;
  #thread: Worker | undefined;
  #ended: Promise<void> = Promise.resolve();
  #closed = false;

  constructor(fd: number, report: (error: unknown) => void) {
    this.#fd = fd;
    this.#report = report;
  }

  invalidateNode(ino: number): void {
    this.#post(encodeInvalInode(ino));
  }

  invalidateEntry(parentIno: number, name: string): void {
    this.#post(encodeInvalEntry(parentIno, name));
  }

  /** The device has ended: nothing is cached any more. Resolves when the thread no longer uses the descriptor. */
  async close(): Promise<void> {
    this.#closed = true;
    this.#thread?.postMessage(null);
    await this.#ended;
  }

  #post(message: Uint8Array): void {
    if (this.#closed) return;
    this.#thread ??= this.#start();
    this.#thread.postMessage(message);
  }

  #start(): Worker {
    const thread = new Worker(new URL('./notifier-thread.js', import.meta.url), { workerData: { fd: this.#fd } });
    thread.on('error', this.#report);
    this.#ended = new Promise((resolve) => {
      thread.once('exit', () => {
        this.#thread = undefined;
        resolve();
      });
    });
    return thread;
  }
}
