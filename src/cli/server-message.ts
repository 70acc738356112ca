/** What a serving process tells the one that started it, over Node's IPC channel: one message, exactly once. */
export type ServerMessage =
  | { readonly kind: 'ready'; readonly mountpoint: string }
  | { readonly kind: 'failed'; readonly message: string };

/** Anything may arrive on a channel: only these two shapes are ours. */
export function isServerMessage(value: unknown): value is ServerMessage {
  if (typeof value !== 'object' || value === null || !('kind' in value)) return false;
  if (value.kind === 'ready') return 'mountpoint' in value && typeof value.mountpoint === 'string';
  return value.kind === 'failed' && 'message' in value && typeof value.message === 'string';
}
