/**
 * A writer for as long as it is told: 4 KiB at random places, one after the other. It remembers the longest time that
 * one write took. Run as `node stall-writer.js FILE BYTES`; it answers each message with what it saw since the last.
 */
import { openSync, writeSync } from 'node:fs';

export interface Stall {
  readonly longestMs: number;
  readonly writes: number;
  /** Of the first write that failed. */
  readonly error: string | undefined;
}

const BLOCK = 4096;
const [path = '', span = '0'] = process.argv.slice(2);
const fd = openSync(path, 'r+');
const block = Buffer.alloc(BLOCK, 0xa5);
let longestMs = 0;
let writes = 0;
let error: string | undefined;
let last = performance.now();

process.on('message', () => {
  const stall: Stall = { longestMs, writes, error };
  longestMs = 0;
  writes = 0;
  error = undefined;
  process.send?.(stall);
});
process.on('disconnect', () => process.exit(0));

function writeSome(): void {
  // A few at a time: between them messages are heard.
  for (let count = 0; count < 16; count++) {
    const position = Math.floor((Math.random() * Number(span)) / BLOCK) * BLOCK;
    try {
      writeSync(fd, block, 0, BLOCK, position);
    } catch (failure) {
      error ??= String(failure);
    }
    const now = performance.now();
    longestMs = Math.max(longestMs, now - last);
    last = now;
    writes++;
  }
  setImmediate(writeSome);
}
writeSome();
