import { describe, expect, it } from 'vitest';
import { fuseNativeCapabilities, fuseOptions, statfsOf } from '../../src/fuse/fuse-native-driver.ts';
import { testDriver } from './driver-suite.ts';

testDriver('fuse-native', fuseNativeCapabilities);

describe('the fuse-native driver', () => {
  it('has libfuse cache nothing, as nothing could be invalidated', () => {
    const options = {
      mountpoint: '/mnt',
      source: 'a,b',
      readOnly: true,
      allowOther: false,
      threads: 2,
      pollMicroseconds: 0,
    };
    expect(fuseOptions(options)).toMatchObject({
      fsname: 'a\\,b',
      subtype: 'vdskfs,direct_io,use_ino,hard_remove,big_writes,nosuid,nodev,ro',
      entryTimeout: '0',
      attrTimeout: '0',
      timeout: false,
    });
  });

  it('tells a size in blocks that 32 bits can count', () => {
    const totalBytes = 2 ** 46; // 64 TiB
    const status = { blockBytes: 4096, totalBytes, freeBytes: totalBytes / 2, availableBytes: 4096, files: 1 };
    expect(statfsOf(status)).toMatchObject({ bsize: 32768, blocks: 2 ** 31, bfree: 2 ** 30, bavail: 0 });
  });
});
