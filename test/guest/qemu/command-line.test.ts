import { describe, expect, it } from 'vitest';
import { restoringArguments } from '../../../src/guest/qemu/command-line.ts';

const where = { statePath: '/m/vm1/snapshots/a/state', diskPath: '/m/vm1/disk.raw', version: undefined };
const INCOMING = ['-incoming', "exec:cat < '/m/vm1/snapshots/a/state'"];

describe('the arguments that restore a guest', () => {
  it('are those it ran with, and where its state comes from', () => {
    const argv = ['qemu-system-x86_64', '-m', '128', '-drive', 'file=/m/vm1/disk.raw,format=raw'];
    expect(restoringArguments(argv, where)).toEqual({ argv: [...argv, ...INCOMING], warnings: [] });
  });

  it('leave out what says how the guest began, and that it waits', () => {
    const disk = ['-hda', '/m/vm1/disk.raw'];
    const argv = ['q', '-S', '-loadvm', 'old', ...disk, '--incoming', 'tcp:0:4444', '-name', 'S'];
    expect(restoringArguments(argv, where).argv).toEqual(['q', ...disk, '-name', 'S', ...INCOMING]);
  });

  it.each([
    ['file=/old/vm1/disk.raw,format=raw', 'file=/m/vm1/disk.raw,format=raw'],
    ['format=raw,file=mnt/vm1/disk.raw', 'format=raw,file=/m/vm1/disk.raw'],
    ['vm1/disk.raw', '/m/vm1/disk.raw'],
    ['/a,,b/vm1/disk.raw', '/m/vm1/disk.raw'],
    ['{"driver":"file","filename":"/old/vm1/disk.raw"}', '{"driver":"file","filename":"/m/vm1/disk.raw"}'],
    ['{"driver":"file","filename":"vm1/disk.raw"}', '{"driver":"file","filename":"/m/vm1/disk.raw"}'],
    ['file=/old/vm10/disk.raw', undefined],
    ['file=/old/xvm1/disk.raw', undefined],
    ['file=/old/vm1/disk.raw.bak', undefined],
    ['file=/old/vm1/disk.raw,,x', undefined],
  ])('the disk where it is now: %s', (before, after) => {
    const { argv, warnings } = restoringArguments(['q', '-drive', before], where);
    expect(argv[2]).toBe(after ?? before);
    expect(warnings).toHaveLength(after === undefined ? 1 : 0);
  });

  it('paths with commas, quotes and dollars', () => {
    const odd = { ...where, statePath: "/m/it's/state", diskPath: '/$&/a,b/disk.raw' };
    const { argv } = restoringArguments(['q', '-drive', 'file=/x/a,,b/disk.raw,if=virtio'], odd);
    expect(argv).toEqual([
      'q',
      '-drive',
      'file=/$&/a,,b/disk.raw,if=virtio',
      '-incoming',
      "exec:cat < '/m/it'\\''s/state'",
    ]);
  });

  it('a QEMU that reads files itself needs no other program', () => {
    const incoming = (major: number, minor: number, statePath = '/s') =>
      restoringArguments(['q', '/m/vm1/disk.raw'], { ...where, statePath, version: { major, minor } }).argv[3];
    expect([incoming(8, 1), incoming(8, 2), incoming(10, 0)]).toEqual(["exec:cat < '/s'", 'file:/s', 'file:/s']);
    expect(incoming(9, 0, '/a,b')).toBe("exec:cat < '/a,b'");
  });

  it('unknown arguments: a template that says so', () => {
    const { argv, warnings } = restoringArguments([], where);
    expect(argv).toEqual(['qemu-system-x86_64', '-drive', 'file=/m/vm1/disk.raw,format=raw,if=virtio', ...INCOMING]);
    expect(warnings[0]).toContain('not known how the guest was started');
  });

  it('descriptors that a manager opened are not there any more', () => {
    const argv = ['q', '-hda', '/m/vm1/disk.raw', '-netdev', 'tap,fd=33,id=n'];
    expect(restoringArguments(argv, where).warnings[0]).toContain('open descriptors');
  });
});
