/** Which checkpoint an exported image holds: kept in its header, so that a later export finds what it may stand on. */
import type { Header } from '../qcow2/header.ts';
import { extensionType, type HeaderExtension } from '../qcow2/header-extensions.ts';

export interface ExportOrigin {
  /** Name of the disk. */
  readonly disk: string;
  /** The checkpoint's real name, and its ID. */
  readonly name: string;
  readonly id: string;
  /** When it was taken, milliseconds since the epoch. */
  readonly createdMs: number;
}

export const encodeOrigin = ({ disk, name, id, createdMs }: ExportOrigin): HeaderExtension => ({
  type: extensionType.ORIGIN,
  data: new TextEncoder().encode(JSON.stringify({ disk, name, id, createdMs })),
});

/** Whether an image was exported from that checkpoint. */
export function isFrom({ extensions }: Header, { disk, name, id, createdMs }: ExportOrigin): boolean {
  const data = extensions.find(({ type }) => type === extensionType.ORIGIN)?.data;
  return data !== undefined && Buffer.from(data).toString() === JSON.stringify({ disk, name, id, createdMs });
}
