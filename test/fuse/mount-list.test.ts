import { describe, expect, it } from 'vitest';
import { parseFstab, parseMount, parseMountinfo } from '../../src/fuse/mount-list.ts';

describe('the list of mounts', () => {
  it('of Linux: /proc/self/mountinfo, with any number of optional fields and octal escapes', () => {
    const text =
      '36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n' +
      '40 35 0:39 / /mnt/my\\040disks\\134\\303\\244 ro,nosuid - fuse.vdskfs /a\\011b.qcow2 ro,user_id=0\n';
    expect(parseMountinfo(text)).toEqual([
      { mountpoint: '/mnt2', source: '/dev/root', readOnly: false, type: 'ext3', device: '98:0' },
      { mountpoint: '/mnt/my disks\\ä', source: '/a\tb.qcow2', readOnly: true, type: 'fuse.vdskfs', device: '0:39' },
    ]);
  });

  it('of FreeBSD: mount -p, as in fstab(5)', () => {
    const text = '/dev/ada0p2\t\t/\t\t\tufs\trw\t\t1 1\n/a.qcow2\t/mnt/vm\tfusefs.vdskfs\tro,nosuid\t0 0\n';
    expect(parseFstab(text)).toEqual([
      { mountpoint: '/', source: '/dev/ada0p2', readOnly: false, type: 'ufs', device: undefined },
      { mountpoint: '/mnt/vm', source: '/a.qcow2', readOnly: true, type: 'fusefs.vdskfs', device: undefined },
    ]);
  });

  it('of macOS: mount', () => {
    expect(parseMount('a.qcow2 on /Volumes/my vm (macfuse, nodev, read-only)\n')).toEqual([
      { mountpoint: '/Volumes/my vm', source: 'a.qcow2', readOnly: true, type: 'macfuse', device: undefined },
    ]);
  });

  it('passes over lines that say nothing', () => {
    expect(parseMountinfo('\nnonsense\n36 35 98:0 / - \n')).toEqual([]);
    expect(parseFstab('one\n')).toEqual([]);
  });
});
