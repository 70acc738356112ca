import { readFileSync } from 'node:fs';
import { Command } from 'commander';
import { addCheck } from './check.ts';
import { addCheckpoint } from './checkpoint.ts';
import { addCompact } from './compact.ts';
import { addCompletion } from './completion.ts';
import { addCreate } from './create.ts';
import { addDelete } from './delete.ts';
import { addDiff } from './diff.ts';
import { addExport } from './export.ts';
import { addInfo } from './info.ts';
import { addLs } from './ls.ts';
import { addMerge } from './merge.ts';
import { addMount } from './mount.ts';
import { addRebase } from './rebase.ts';
import { addRename } from './rename.ts';
import { addResize } from './resize.ts';
import { addRestore } from './restore.ts';
import { addRollback } from './rollback.ts';
import { addSpace } from './space.ts';
import { addStatus } from './status.ts';
import { addUnmount } from './unmount.ts';

/** The whole command line, in the order of its help. Parsing throws CommanderError instead of ending the process. */
export function createProgram(): Command {
  const program = new Command('vdskfs')
    .description('qcow2 disks with checkpoints, as a file system')
    .version(packageVersion(), '-V, --version')
    .showHelpAfterError('(--help after the command shows how it is used)')
    .configureOutput({ outputError: (text, write) => write(text.replace(/^error: /, 'vdskfs: ')) })
    .exitOverride();
  for (const add of [
    addMount,
    addUnmount,
    addStatus,
    addCreate,
    addInfo,
    addLs,
    addCheckpoint,
    addDelete,
    addRename,
    addRollback,
    addRestore,
    addExport,
    addDiff,
    addSpace,
    addResize,
    addCompact,
    addCheck,
    addMerge,
    addRebase,
    addCompletion,
  ]) {
    add(program);
  }
  return program;
}

function packageVersion(): string {
  // Two folders up from src/cli and from dist/cli alike.
  const text = readFileSync(new URL('../../package.json', import.meta.url), 'utf8');
  return (JSON.parse(text) as { version: string }).version;
}
