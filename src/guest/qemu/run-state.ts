/** QEMU's run states (qapi/run-state.json) in our terms, and which of them no state can be saved in. */
import type { Errno } from '../../errors.ts';
import type { GuestState } from '../guest.ts';

interface RunState {
  readonly state: GuestState;
  readonly unsavable?: readonly [Errno, string];
}

export const RUN_STATES: Readonly<Record<string, RunState>> = {
  running: { state: 'running' },
  // Asleep by its own will, and woken by its own devices; QEMU restores such a guest without waking it.
  suspended: { state: 'running', unsavable: ['EBUSY', 'The guest sleeps (S3): wake it before its memory is saved.'] },
  paused: { state: 'paused' },
  debug: { state: 'paused' },
  'io-error': { state: 'paused' },
  watchdog: { state: 'paused' },
  'guest-panicked': { state: 'paused' },
  prelaunch: { state: 'paused' },
  'save-vm': { state: 'paused', unsavable: ['EBUSY', 'QEMU saves this guest already: try again when that is over.'] },
  'restore-vm': { state: 'paused', unsavable: ['EBUSY', 'QEMU restores this guest: try again when it runs.'] },
  colo: { state: 'paused', unsavable: ['EBUSY', 'This guest is half of a COLO pair, and cannot be saved.'] },
  inmigrate: {
    state: 'paused',
    unsavable: ['EBUSY', 'This guest is being restored, or migrated to this host: try again when it runs.'],
  },
  'finish-migrate': {
    state: 'paused',
    unsavable: ['EBUSY', 'QEMU migrates this guest already: try again when that is over.'],
  },
  postmigrate: {
    state: 'paused',
    unsavable: [
      'EBUSY',
      'QEMU saves a guest that stays paused only once: resume it first, or take the checkpoint with --no-memory.',
    ],
  },
  'internal-error': {
    state: 'paused',
    unsavable: ['EIO', 'QEMU stopped this guest for an internal error: its state is worth nothing.'],
  },
  shutdown: {
    state: 'off',
    unsavable: ['EBUSY', 'The guest has shut down: end QEMU, or take the checkpoint with --no-memory.'],
  },
};

export const guestState = (runState: string): GuestState => RUN_STATES[runState]?.state ?? 'unknown';
