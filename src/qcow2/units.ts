/**
 * The units of the format, as types that cannot be swapped by mistake. All are exact integers below 2^53;
 * cluster arithmetic is `/`, `%` and `*`, never `&`, `|` or shifts, which keep 32 bits only.
 */
import { FsError } from '../errors.ts';

declare const unit: unique symbol;
type Unit<Name extends string> = number & { readonly [unit]: Name };

/** Byte offset the guest sees; 0 ≤ offset < virtual size. */
export type GuestOffset = Unit<'GuestOffset'>;
/** Byte offset in the image file (or the external data file). */
export type HostOffset = Unit<'HostOffset'>;
/** Host offset ÷ cluster size. */
export type HostCluster = Unit<'HostCluster'>;

const HIGH = 2 ** 32;

/**
 * The one way from two on-disk halves to a number. The format allows 2^56; a number is exact to 2^53.
 * @throws FsError EFBIG above 2^53
 */
export function joinHalves(high: number, low: number): number {
  if (high >>> 21 !== 0) {
    throw new FsError(
      'EFBIG',
      `offset 0x${(high >>> 0).toString(16)}${(low >>> 0).toString(16).padStart(8, '0')} is above 2^53`,
    );
  }
  return high * HIGH + (low >>> 0);
}

/** Upper 32 bits of an offset. */
export const highHalf = (offset: number): number => Math.floor(offset / HIGH) >>> 0;
/** Lower 32 bits of an offset. */
export const lowHalf = (offset: number): number => offset >>> 0;

/** How an offset or a size is written in messages. */
export const hex = (value: number | bigint): string => `0x${value.toString(16)}`;
