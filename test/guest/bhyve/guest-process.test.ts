import { expect, it } from 'vitest';
import { findGuestProcess } from '../../../src/guest/bhyve/guest-process.ts';

it.each<[string[], string[] | undefined]>([
  [['bhyve: web0'], []],
  [
    ['bhyve: web0', '-c', '2', 'web0'],
    ['bhyve', '-c', '2', 'web0'],
  ],
  [
    ['/usr/sbin/bhyve', '-c', '2', 'web0'],
    ['/usr/sbin/bhyve', '-c', '2', 'web0'],
  ],
  [
    ['/bin/sh', '/opt/bhyve', 'web0'],
    ['/opt/bhyve', 'web0'],
  ],
  [['bhyve: web01'], undefined],
  [['bhyve: web'], undefined],
  [['bhyve', 'web01'], undefined],
  [['bhyve'], undefined],
  [['bhyvectl', '--vm=web0', 'web0'], undefined],
  [['vi', 'bhyve', 'web0'], undefined],
  [['grep', 'bhyve: web0'], undefined],
])('the guest web0 in %j: %j', (shown, argv) => {
  const found = findGuestProcess(
    [
      { pid: 1, argv: ['init'] },
      { pid: 7, argv: shown },
    ],
    'web0',
  );
  expect(found).toEqual(argv === undefined ? undefined : { pid: 7, argv });
});

it('one that has its title goes before one that is only being started', () => {
  const list = [
    { pid: 7, argv: ['/usr/bin/sudo', '/usr/sbin/bhyve', 'web0'] },
    { pid: 8, argv: ['bhyve: web0'] },
  ];
  expect(findGuestProcess(list, 'web0')?.pid).toBe(8);
});
