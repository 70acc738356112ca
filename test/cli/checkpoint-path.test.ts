import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { splitCheckpointPath } from '../../src/cli/checkpoint-path.ts';
import { withDirectory } from '../e2e/run.ts';

it('takes what exists as the path, the longest of it, and the rest as the name', () =>
  withDirectory(async (directory) => {
    for (const file of ['vm1', 'vm1@home', 'a@b']) writeFileSync(join(directory, file), '');
    const split = (text: string) => {
      const { path, name } = splitCheckpointPath(join(directory, text));
      return [path.slice(directory.length + 1), name];
    };
    expect(split('vm1')).toEqual(['vm1', undefined]);
    expect(split('vm1@home')).toEqual(['vm1@home', undefined]);
    expect(split('vm1@other')).toEqual(['vm1', 'other']);
    expect(split('vm1@home@x')).toEqual(['vm1@home', 'x']);
    expect(split('vm1@x@y')).toEqual(['vm1', 'x@y']);
    expect(split('a@b@c')).toEqual(['a@b', 'c']);
    expect(split('missing@x')).toEqual(['missing', 'x']);
    expect(split('missing')).toEqual(['missing', undefined]);
  }));
