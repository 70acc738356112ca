import { describe, expect, it } from 'vitest';
import { freebsdMount, fusermountMount, linuxMount, unmountCommand } from '../../src/fuse/mount-command.ts';

const plain = { mountpoint: '/mnt/vm', source: '/images/a,b.qcow2', readOnly: false, allowOther: false };
const owner = { uid: 0, gid: 0 };

describe('mounting', () => {
  it('on Linux as root runs mount(8) on the inherited descriptor, without its helper', () => {
    expect(linuxMount(plain, 17, owner)).toEqual({
      program: 'mount',
      args: [
        '-i',
        '-t',
        'fuse.vdskfs',
        '-o',
        'fd=3,rootmode=40000,user_id=0,group_id=0,nosuid,nodev,max_read=1048576',
        '--',
        '/images/a,b.qcow2',
        '/mnt/vm',
      ],
      inherited: 17,
    });
  });

  it('lets others in only with the kernel checking permissions', () => {
    const { args } = linuxMount({ ...plain, readOnly: true, allowOther: true }, 17, owner);
    expect(args[4]).toBe(
      'fd=3,rootmode=40000,user_id=0,group_id=0,nosuid,nodev,ro,allow_other,default_permissions,max_read=1048576',
    );
  });

  it('on Linux as a user runs fusermount3 with a socket, and protects commas of the source', () => {
    expect(fusermountMount(plain, 18)).toEqual({
      program: 'fusermount3',
      args: ['-o', 'fsname=/images/a\\,b.qcow2,subtype=vdskfs,max_read=1048576', '--', '/mnt/vm'],
      env: { _FUSE_COMMFD: '3' },
      inherited: 18,
    });
  });

  it('on FreeBSD runs mount_fusefs on the inherited descriptor, with max_read, and without a daemon', () => {
    expect(freebsdMount({ ...plain, readOnly: true }, 19)).toEqual({
      program: 'mount_fusefs',
      args: ['-o', 'subtype=vdskfs,fsname=/images/a\\,b.qcow2,nosuid,ro,max_read=1048576', '3', '/mnt/vm'],
      env: { MOUNT_FUSEFS_SAFE: '1', MOUNT_FUSEFS_CALL_BY_LIB: '1' },
      inherited: 19,
    });
  });
});

describe('unmounting', () => {
  it.each([
    ['linux-root', false, 'umount -c -i -- /mnt/vm'],
    ['linux-root', true, 'umount -c -i -l -- /mnt/vm'],
    ['linux-user', false, 'fusermount3 -u -- /mnt/vm'],
    ['linux-user', true, 'fusermount3 -u -z -- /mnt/vm'],
    ['freebsd', false, 'umount /mnt/vm'],
    ['freebsd', true, 'umount -f /mnt/vm'],
    ['darwin', false, 'umount /mnt/vm'],
  ] as const)('%s, lazily: %s, asks nothing of the mount', (way, lazy, expected) => {
    const { program, args } = unmountCommand(way, '/mnt/vm', lazy);
    expect([program, ...args].join(' ')).toBe(expected);
  });
});
