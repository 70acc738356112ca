/**
 * Checkpoints of a bhyve that is built with libvdsk and holds the qcow2 image itself: forwarded to it by bhyvectl. Its
 * exit status says that the request was delivered; the image shows when the checkpoint is there.
 */
import type { AttachedCheckpoints } from '../guest.ts';
import { attachedArguments, type BhyvectlTarget, bhyvectl } from './bhyvectl.ts';

const TAKE = { internal: '--checkpoint', external: '--ext-checkpoint' } as const;
const DELETE = { internal: '--del-checkpoint', external: '--del-ext-checkpoint' } as const;

export const attachedCheckpoints = (target: BhyvectlTarget): AttachedCheckpoints => ({
  async take(kind, name) {
    await bhyvectl(target, attachedArguments(target, TAKE[kind], name));
  },
  async delete(kind, name) {
    await bhyvectl(target, attachedArguments(target, DELETE[kind], name));
  },
});
