/** What QEMU and its guest agent answer is input: fields are taken out of it by these, or the answer is refused. */
import { FsError } from '../../errors.ts';

export type JsonObject = Readonly<Record<string, unknown>>;

const wrong = (what: string, expected: string, value: unknown): FsError =>
  new FsError('EIO', `QEMU answered nonsense: ${what} is no ${expected} but ${JSON.stringify(value)?.slice(0, 80)}.`);

export const isObject = (value: unknown): value is JsonObject =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

/** @throws FsError EIO, as all of these do */
export function asObject(value: unknown, what: string): JsonObject {
  if (!isObject(value)) throw wrong(what, 'object', value);
  return value;
}

export function asArray(value: unknown, what: string): readonly unknown[] {
  if (!Array.isArray(value)) throw wrong(what, 'array', value);
  return value;
}

export function asText(value: unknown, what: string): string {
  if (typeof value !== 'string') throw wrong(what, 'string', value);
  return value;
}

export function asNumber(value: unknown, what: string): number {
  if (typeof value !== 'number') throw wrong(what, 'number', value);
  return value;
}
