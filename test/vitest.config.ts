import { fileURLToPath } from 'node:url';
import { defineConfig } from 'vitest/config';
import { soakFactor } from './property-runs.ts';

const mounted = (driver: string, order: number) => ({
  test: {
    name: `e2e ${driver}`,
    include: ['test/e2e/**/*.test.ts'],
    env: { VDSKFS_DRIVER: driver },
    testTimeout: 120_000,
    hookTimeout: 60_000,
    // They wait for other programs half of the time.
    maxWorkers: 2,
    sequence: { groupOrder: order },
  },
});

export default defineConfig({
  root: fileURLToPath(new URL('..', import.meta.url)),
  test: {
    projects: [
      {
        test: {
          name: 'unit',
          include: ['test/**/*.test.ts'],
          exclude: ['test/e2e/**', 'test/bench/**'],
          testTimeout: 30_000 * soakFactor,
          // For those that name no number of runs.
          setupFiles: soakFactor > 1 ? ['test/property-runs.ts'] : [],
          sequence: { groupOrder: 0 },
        },
      },
      mounted('native', 1),
      mounted('fuse-native', 2),
    ],
  },
});
