import { Worker } from 'node:worker_threads';
import { describe, expect, it } from 'vitest';
import { lock, unlock } from '../../src/qcow2/mutex.ts';

/** The same two functions, for a thread that cannot load TypeScript. */
const code = `
  const { workerData, parentPort } = require('node:worker_threads');
  const lock = ${lock.toString()};
  const unlock = ${unlock.toString()};
  const SPINS = 100;
  const words = new Int32Array(workerData);
  for (let turn = 0; turn < 20000; turn++) {
    lock(words, 0);
    const before = words[1];
    words[2] = turn;
    words[1] = before + 1;
    unlock(words, 0);
  }
  parentPort.postMessage('done');
`;

describe('the mutex', () => {
  it('is one word: free, held, free again', () => {
    const words = new Int32Array(new SharedArrayBuffer(8));
    lock(words, 1);
    expect([...words]).toEqual([0, 1]);
    unlock(words, 1);
    expect([...words]).toEqual([0, 0]);
  });

  it('that nobody holds is taken even if its mark says that somebody waited', () => {
    const words = new Int32Array(new SharedArrayBuffer(4));
    lock(words, 0);
    words[0] = 2;
    unlock(words, 0);
    lock(words, 0);
    expect(words[0]).toBe(1);
  });

  it('lets one thread in at a time: no count is lost', async () => {
    const memory = new SharedArrayBuffer(12);
    const workers = [0, 1, 2].map(() => new Worker(code, { eval: true, workerData: memory }));
    try {
      await Promise.all(
        workers.map(
          (worker) =>
            new Promise((resolve, reject) => {
              worker.once('message', resolve);
              worker.once('error', reject);
            }),
        ),
      );
    } finally {
      for (const worker of workers) await worker.terminate();
    }
    const words = new Int32Array(memory);
    expect(words[1]).toBe(60_000);
    expect(words[0]).toBe(0);
  });
});
