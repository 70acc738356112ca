/** What `stats` answers for a QEMU guest: lines `key: value`, as QEMU counts. */
import { asArray, asNumber, asObject, asText } from './json-fields.ts';
import type { QmpClient } from './qmp-client.ts';

/** BlockDeviceStats of qapi/block-core.json, and how we call them. */
const COUNTERS = [
  ['rd_operations', 'reads'],
  ['rd_bytes', 'bytes read'],
  ['wr_operations', 'writes'],
  ['wr_bytes', 'bytes written'],
  ['flush_operations', 'flushes'],
] as const;

export async function statistics(qmp: QmpClient): Promise<string> {
  const { status } = asObject(await qmp.execute('query-status'), 'query-status');
  const vcpus = asArray(await qmp.execute('query-cpus-fast'), 'query-cpus-fast');
  const memory = asObject(await qmp.execute('query-memory-size-summary'), 'query-memory-size-summary');
  const lines = [
    `QEMU: ${qmp.version.text}`,
    `status: ${asText(status, 'status')}`,
    `vcpus: ${vcpus.length}`,
    `memory: ${asNumber(memory['base-memory'], 'base-memory')} bytes`,
  ];
  for (const listed of asArray(await qmp.execute('query-blockstats'), 'query-blockstats')) {
    const { device, qdev, stats } = asObject(listed, 'a device');
    const counted = asObject(stats, 'stats');
    const name = [device, qdev].find((one) => typeof one === 'string' && one !== '') ?? 'disk';
    const counts = COUNTERS.map(([key, word]) => `${asNumber(counted[key], key)} ${word}`);
    lines.push(`${name}: ${counts.join(', ')}`);
  }
  return lines.join('\n');
}
