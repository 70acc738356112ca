import { CommanderError } from 'commander';
import createDebug from 'debug';
import { exitStatus, sentenceOf } from './failure.ts';
import { createProgram } from './program.ts';

const debug = createDebug('vdskfs:cli');

// `vdskfs ls … | head`: whoever read has what it wanted.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit(exitStatus.DONE);
  throw error;
});

try {
  await createProgram().parseAsync(process.argv);
} catch (error) {
  if (error instanceof CommanderError) {
    // Commander has printed it already; help and version that were asked for have status 0.
    process.exitCode = error.exitCode === 0 ? exitStatus.DONE : exitStatus.USAGE;
  } else {
    debug('%O', error);
    process.stderr.write(`vdskfs: ${sentenceOf(error)}\n`);
    process.exitCode = exitStatus.FAILED;
  }
}
