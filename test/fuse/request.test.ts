import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { FsError } from '../../src/errors.ts';
import { operations } from '../../src/fuse/operations.ts';
import { decodeHeader, decodeRequest } from '../../src/fuse/request.ts';
import { integers, name, opcode, request, writeArgument } from './kernel-message.ts';

const decode = (message: Uint8Array) => decodeRequest(decodeHeader(message), message);
const errnoOf = (work: () => unknown): string => {
  try {
    work();
  } catch (error) {
    return (error as FsError).errno;
  }
  return 'none';
};

describe('a request', () => {
  it('has a header of 40 bytes: len, opcode, unique, nodeid, uid, gid, pid', () => {
    const bytes = Buffer.from(
      '28000000' + // len 40
        '11000000' + // STATFS
        'f00000000000ff7f' + // unique with its high bits in use
        '0200000000000000' + // nodeid
        'e8030000' + // uid 1000
        '64000000' + // gid 100
        '39300000' + // pid 12345
        '00000000',
      'hex',
    );
    expect(decodeHeader(bytes)).toMatchObject({
      len: 40,
      opcode: 17,
      unique: 0x7fff_0000_0000_00f0n,
      nodeid: 2n,
      uid: 1000,
      gid: 100,
      pid: 12345,
    });
  });

  it('LOOKUP carries one name without a fixed body', () => {
    expect(decode(request(opcode.LOOKUP, {}, name('disk.raw')))).toMatchObject({ name: 'LOOKUP', names: ['disk.raw'] });
  });

  it('RENAME2 carries newdir and flags, then two names', () => {
    const decoded = decode(
      request(opcode.RENAME2, { nodeid: 7 }, integers([9, 8], [1, 4], [0, 4]), name('old'), name('néw')),
    );
    expect(decoded).toMatchObject({ name: 'RENAME2', arg: { newdir: 9n, flags: 1 }, names: ['old', 'néw'] });
  });

  it('CREATE carries flags, mode, umask and open_flags before its name', () => {
    const decoded = decode(
      request(opcode.CREATE, {}, integers([0x8241, 4], [0o100644, 4], [0o22, 4], [0, 4]), name('state')),
    );
    expect(decoded).toMatchObject({ arg: { flags: 0x8241, mode: 0o100644, umask: 0o22 }, names: ['state'] });
  });

  it('SETATTR has 88 bytes: what is valid, then the values', () => {
    const body = Buffer.alloc(88);
    body.writeUInt32LE(0x248, 0); // SIZE, FH, LOCKOWNER, as ftruncate(2) sends it
    body.writeBigUInt64LE(5n, 8); // fh
    body.writeBigUInt64LE(0x1_0000_0000n, 16); // size
    body.writeUInt32LE(0o100600, 68); // mode
    body.writeUInt32LE(11, 76); // uid
    body.writeUInt32LE(12, 80); // gid
    expect(decode(request(opcode.SETATTR, {}, body))).toMatchObject({
      arg: { valid: 0x248, fh: 5n, size: 0x1_0000_0000n, mode: 0o100600, uid: 11, gid: 12 },
    });
  });

  it('the data of WRITE starts at byte 80 of the message', () => {
    const message = request(opcode.WRITE, {}, writeArgument(3, 4096, 5), Buffer.from('hello'));
    expect(message.indexOf('hello')).toBe(80);
    expect(Buffer.from(decode(message).rest).toString()).toBe('hello');
  });

  it('an opcode outside the table is ENOSYS', () => {
    expect(errnoOf(() => decode(request(opcode.GETXATTR, {}, integers([0, 4], [0, 4]), name('user.x'))))).toBe(
      'ENOSYS',
    );
    expect(errnoOf(() => decode(request(4711, {})))).toBe('ENOSYS');
  });

  it.each([
    ['shorter than a header', Buffer.alloc(39)],
    ['of another length than its header says', Buffer.concat([request(opcode.STATFS, {}), Buffer.alloc(1)])],
    ['with a body cut short', request(opcode.READ, {}, Buffer.alloc(39))],
    ['with a name that does not end', request(opcode.LOOKUP, {}, Buffer.from('endless'))],
    ['with one name where two belong', request(opcode.RENAME, {}, integers([1, 8]), name('old'))],
  ])('%s is refused with EIO', (_rule, message) => {
    expect(errnoOf(() => decode(message))).toBe('EIO');
  });

  it('a name may have 255 bytes, not 256', () => {
    expect(decode(request(opcode.LOOKUP, {}, name('ä'.repeat(127))))).toMatchObject({ names: ['ä'.repeat(127)] });
    expect(errnoOf(() => decode(request(opcode.LOOKUP, {}, name('ä'.repeat(128)))))).toBe('ENAMETOOLONG');
  });

  it('a name that is no UTF-8 is EINVAL', () => {
    expect(errnoOf(() => decode(request(opcode.LOOKUP, {}, Buffer.from([0xff, 0xfe, 0]))))).toBe('EINVAL');
  });

  it('of any bytes is decoded or refused with an errno', () => {
    const codes = Object.values(operations).map((operation) => operation.opcode);
    fc.assert(
      fc.property(fc.constantFrom(...codes), fc.uint8Array({ maxLength: 200 }), (code, body) => {
        const message = request(code, {}, body);
        try {
          decode(message);
        } catch (error) {
          expect(error).toBeInstanceOf(FsError);
        }
      }),
    );
  });
});
