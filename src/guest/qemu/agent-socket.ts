/** Where QEMU listens for clients of the guest agent: found by the agent's serial port, as it is configured. */
import { isAbsolute, join } from 'node:path';
import { asArray, asObject, asText, isObject } from './json-fields.ts';
import { processDirectory } from './process.ts';
import type { QmpClient } from './qmp-client.ts';

/** The port's name by which the agent in the guest finds it. */
const PORT_NAME = 'org.qemu.guest_agent.0';
/** Where QEMU keeps the devices that it was told to have, with an id and without. */
const DEVICE_FOLDERS = ['/machine/peripheral', '/machine/peripheral-anon'];

/** @returns undefined where the guest has no such port, or one that leads to no socket of the UNIX domain */
export async function agentSocket(qmp: QmpClient): Promise<string | undefined> {
  const device = await agentDevice(qmp);
  if (device === undefined) return undefined;
  const chardev = await qmp.execute('qom-get', { path: device, property: 'chardev' });
  for (const listed of asArray(await qmp.execute('query-chardev'), 'query-chardev')) {
    const { label, filename } = asObject(listed, 'a chardev');
    if (label !== chardev) continue;
    // "disconnected:unix:/run/agent,server=on"; where QEMU is the client, somebody else listens.
    const path = /^(?:disconnected:)?unix:(.*),server(?:=on)?$/.exec(asText(filename, 'filename'))?.[1];
    if (path === undefined || isAbsolute(path)) return path;
    const directory = await processDirectory(qmp.process);
    return directory === undefined ? undefined : join(directory, path);
  }
  return undefined;
}

async function agentDevice(qmp: QmpClient): Promise<string | undefined> {
  for (const folder of DEVICE_FOLDERS) {
    for (const child of asArray(await qmp.execute('qom-list', { path: folder }), 'qom-list')) {
      if (!isObject(child) || child.type !== 'child<virtserialport>') continue;
      const path = `${folder}/${asText(child.name, 'name')}`;
      if ((await qmp.execute('qom-get', { path, property: 'name' })) === PORT_NAME) return path;
    }
  }
  return undefined;
}
