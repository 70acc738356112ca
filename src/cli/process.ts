/** Other processes of this host, told apart even when a process id is used again. */
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';

/** The field of /proc/PID/stat behind the command's name that is the start time; proc(5) counts it as field 22. */
const START_TIME = 19;

/**
 * Something that differs between any two processes that had `pid` one after the other; undefined if there is none now.
 */
export function processStart(pid: number): string | undefined {
  if (process.platform !== 'linux') return startFromPs(pid);
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    // The command's name is in parentheses and may hold any character.
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    return fields[0] === 'Z' ? undefined : fields[START_TIME];
  } catch {
    return undefined;
  }
}

function startFromPs(pid: number): string | undefined {
  try {
    const text = execFileSync('ps', ['-o', 'lstart=', '-p', String(pid)], {
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'ignore'],
      env: { ...process.env, LC_ALL: 'C' },
    });
    return text.trim() === '' ? undefined : text.trim();
  } catch {
    return undefined;
  }
}
