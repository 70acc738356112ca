/**
 * npm test [-- words for vitest]: all that is checked of this tree, from a fresh clone. The last line is the counts:
 * vitest's cases, and one failure more for each other step that failed.
 */
import { spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

process.chdir(fileURLToPath(new URL('..', import.meta.url)));

let child;
let stopped = false;
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
  process.on(signal, () => {
    stopped = true;
    child?.kill(signal);
  });
}

/** Run one step with its output on ours; says whether it succeeded. Once stopped by a signal, none does. */
async function step(name, command, args) {
  if (stopped) return false;
  process.stdout.write(`\n== ${name}\n`);
  return new Promise((resolve) => {
    child = spawn(command, args, { stdio: 'inherit' });
    child.on('error', (error) => {
      process.stderr.write(`${command}: ${error.message}\n`);
      resolve(false);
    });
    child.on('exit', (status) => resolve(status === 0));
  });
}

/** Counts of vitest's JSON report. A file that could not be loaded has no cases: it counts as one failure. */
function counts(file) {
  let report;
  try {
    report = JSON.parse(readFileSync(file, 'utf8'));
  } catch {
    return { passed: 0, failed: 1, skipped: 0 }; // vitest died before it could report
  }
  const broken = report.testResults.filter(
    ({ status, assertionResults }) => status === 'failed' && !assertionResults.some((one) => one.status === 'failed'),
  );
  return {
    passed: report.numPassedTests,
    failed: report.numFailedTests + broken.length,
    skipped: report.numPendingTests + report.numTodoTests,
  };
}

const scratch = mkdtempSync(join(tmpdir(), 'vdskfs-report-'));
const report = join(scratch, 'report.json');
const bin = (name) => join('node_modules', '.bin', name);

const steps = [await step('packages and build', 'bin/setup', ['--for-tests'])];
steps.push(await step('format and lint', bin('biome'), ['check']));
steps.push(await step('types of the tests', bin('tsc'), ['-p', 'test/tsconfig.json']));
const vitest = ['run', '--config', 'test/vitest.config.ts', '--reporter=default', '--reporter=json'];
const tested = await step('tests', bin('vitest'), [...vitest, `--outputFile.json=${report}`, ...process.argv.slice(2)]);

const { passed, failed, skipped } = counts(report);
rmSync(scratch, { recursive: true, force: true });
const otherFailures = steps.filter((ok) => !ok).length;
const allFailed = failed + otherFailures + (!tested && failed === 0 ? 1 : 0);
process.stdout.write(`\n${passed} passed, ${allFailed} failed, ${skipped} skipped\n`);
process.exitCode = allFailed === 0 && passed > 0 ? 0 : 1;
