/** How often property tests run: `npm run soak` multiplies it, to find what one run in a thousand meets. */
import fc from 'fast-check';

/** For vitest's configuration, too: time limits grow with it. */
export const soakFactor = Math.max(1, Number(process.env.VDSKFS_SOAK ?? 1));

/** @param usual runs in `npm test` */
export const propertyRuns = (usual: number): number => Math.ceil(usual * soakFactor);

fc.configureGlobal({ numRuns: propertyRuns(100) });
