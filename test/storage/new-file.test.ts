import { existsSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { writeNewFile } from '../../src/storage/new-file.ts';
import { withDirectory } from '../e2e/run.ts';

const bytes = new TextEncoder().encode('whole');

it('appears when it is complete', () =>
  withDirectory(async (directory) => {
    const path = join(directory, 'a');
    await writeNewFile(path, async (file) => {
      file.write(bytes, 0, bytes.length, 0);
      expect(existsSync(path)).toBe(false);
    });
    expect(readFileSync(path, 'utf8')).toBe('whole');
    expect(readdirSync(directory)).toEqual(['a']);
  }));

it('leaves nothing when writing fails', () =>
  withDirectory(async (directory) => {
    const written = writeNewFile(join(directory, 'a'), async (file) => {
      file.write(bytes, 0, bytes.length, 0);
      throw new Error('interrupted');
    });
    await expect(written).rejects.toThrow('interrupted');
    expect(readdirSync(directory)).toEqual([]);
  }));

it('never replaces a file, not even one that comes to be meanwhile, nor a link that leads nowhere', () =>
  withDirectory(async (directory) => {
    const path = join(directory, 'a');
    const late = writeNewFile(path, async () => writeFileSync(path, 'theirs'));
    await expect(late).rejects.toMatchObject({ errno: 'EEXIST' });
    await expect(writeNewFile(path, async () => {})).rejects.toMatchObject({ errno: 'EEXIST' });
    expect(readFileSync(path, 'utf8')).toBe('theirs');
    symlinkSync('nowhere', join(directory, 'b'));
    await expect(writeNewFile(join(directory, 'b'), async () => {})).rejects.toMatchObject({ errno: 'EEXIST' });
    expect(readdirSync(directory).sort()).toEqual(['a', 'b']);
  }));
