/** npm run bench [-- options]: compile the comparison and run it. */
import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';

process.chdir(fileURLToPath(new URL('..', import.meta.url)));
const { status } = spawnSync('node_modules/.bin/tsc', ['-p', 'test/bench'], { stdio: 'inherit' });
if (status !== 0) process.exit(1);
await import(new URL('../build/bench/main.js', import.meta.url).href);
