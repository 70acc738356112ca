/**
 * A MemoryFileSystem mounted by a process of its own, so that the test may use blocking calls on it. The process runs
 * the compiled drivers in dist; the test's own modules are transpiled for it into a temporary directory.
 */

import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import ts from 'typescript';
import type { DriverCapabilities, MountOptions } from '../../src/fuse/driver.ts';
import type { counter } from './memory-disk.ts';

export type DriverName = 'native' | 'fuse-native';

export interface ServerOptions extends MountOptions {
  readonly driver: DriverName;
  /** Data threads serve disk.raw; else everything goes through OpenFile. `broken`: they cannot start. */
  readonly dataPlane: boolean | 'broken';
}

export type ToServer =
  | { readonly kind: 'unmount' }
  | { readonly kind: 'counter'; readonly name: keyof typeof counter }
  | { readonly kind: 'openFiles' }
  | { readonly kind: 'waiting' }
  | { readonly kind: 'rewrite'; readonly name: string; readonly text: string; readonly notify: boolean }
  | { readonly kind: 'drop'; readonly name: string }
  | { readonly kind: 'block'; readonly ms: number };

export type FromServer =
  | { readonly kind: 'mounted'; readonly capabilities: DriverCapabilities }
  | { readonly kind: 'answer'; readonly value: number }
  | { readonly kind: 'refused'; readonly errno: string; readonly message: string }
  | { readonly kind: 'ended'; readonly openFiles: number };

const here = dirname(fileURLToPath(import.meta.url));
const dist = join(here, '..', '..', 'dist');

/** The modules of the server as JavaScript, in `directory`. */
function transpileInto(directory: string): void {
  writeFileSync(join(directory, 'package.json'), '{ "type": "module" }');
  for (const name of readdirSync(here)) {
    if (!name.startsWith('memory-') || !name.endsWith('.ts')) continue;
    const source = readFileSync(join(here, name), 'utf8');
    const { outputText } = ts.transpileModule(source, {
      compilerOptions: { module: ts.ModuleKind.ES2022, target: ts.ScriptTarget.ES2022, verbatimModuleSyntax: true },
    });
    const output = outputText
      .replaceAll(/'\.\.\/\.\.\/src\/([^']+)\.ts'/g, (_, path) => `'${pathToFileURL(join(dist, `${path}.js`)).href}'`)
      .replaceAll(/'\.\/([^']+)\.ts'/g, `'./$1.js'`);
    writeFileSync(join(directory, name.replace(/\.ts$/, '.js')), output);
  }
}

export class MountedMemory {
  readonly mountpoint: string;
  readonly capabilities: DriverCapabilities;
  /** Resolves when the server says that the mount has ended. */
  readonly ended: Promise<Extract<FromServer, { kind: 'ended' }>>;
  readonly #server: ChildProcess;
  readonly #directory: string;
  /** Resolves to the exit status of the server; null if a signal ended it. */
  readonly exited: Promise<number | null>;

  private constructor(
    directory: string,
    mountpoint: string,
    server: ChildProcess,
    exited: Promise<number | null>,
    capabilities: DriverCapabilities,
  ) {
    this.#directory = directory;
    this.mountpoint = mountpoint;
    this.#server = server;
    this.exited = exited;
    this.capabilities = capabilities;
    this.ended = messageOf(server, 'ended');
    this.ended.catch(() => {});
  }

  /** @throws Error with the server's words if it does not mount */
  static async start(options: Partial<ServerOptions> & { driver: DriverName }): Promise<MountedMemory> {
    const directory = mkdtempSync(join(tmpdir(), 'vdskfs-fuse-'));
    const mountpoint = options.mountpoint ?? join(directory, 'mnt');
    if (options.mountpoint === undefined) mkdirSync(mountpoint);
    transpileInto(directory);
    const full: ServerOptions = {
      source: 'memory',
      readOnly: false,
      allowOther: false,
      threads: 2,
      pollMicroseconds: 20,
      dataPlane: true,
      ...options,
      mountpoint,
    };
    const server = spawn(process.execPath, [join(directory, 'memory-server.js'), JSON.stringify(full)], {
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    });
    const exited = new Promise<number | null>((resolve) => server.once('exit', (status) => resolve(status)));
    try {
      const { capabilities } = await messageOf(server, 'mounted');
      return new MountedMemory(directory, mountpoint, server, exited, capabilities);
    } catch (error) {
      server.kill('SIGKILL');
      await exited;
      rmSync(directory, { recursive: true, force: true });
      throw error;
    }
  }

  get pid(): number {
    return this.#server.pid as number;
  }

  path(...names: string[]): string {
    return join(this.mountpoint, ...names);
  }

  /** Send a command and wait for its answer. One at a time. @throws Error with the errno and the words of a refusal */
  async ask(command: ToServer): Promise<number> {
    const answer = messageOf(this.#server, 'answer');
    this.#server.send(command);
    return (await answer).value;
  }

  /** SIGKILL: what stays is a mount without a server. */
  async kill(): Promise<void> {
    this.#server.kill('SIGKILL');
    await this.exited;
  }

  /** Leave nothing behind, whatever state the test ended in. */
  async remove(): Promise<void> {
    // Lazily: a failed test may have left files open. Nothing mounted any more is no failure here.
    spawnSync('umount', ['-c', '-i', '-l', this.mountpoint], { stdio: 'ignore' });
    this.#server.kill('SIGKILL');
    await this.exited;
    rmSync(this.#directory, { recursive: true, force: true });
  }
}

/** The next message of that kind. Rejects if the server refuses or goes away before. */
function messageOf<K extends FromServer['kind']>(
  server: ChildProcess,
  kind: K,
): Promise<Extract<FromServer, { kind: K }>> {
  return new Promise((resolve, reject) => {
    const settle = (): void => {
      server.off('message', received);
      server.off('exit', exited);
    };
    const received = (message: FromServer): void => {
      if (message.kind === kind) resolve(message as Extract<FromServer, { kind: K }>);
      else if (message.kind === 'refused' && kind !== 'ended') {
        reject(Object.assign(new Error(message.message), { errno: message.errno }));
      } else return;
      settle();
    };
    const exited = (): void => {
      reject(new Error(`the server exited before it said '${kind}'`));
      settle();
    };
    server.on('message', received);
    server.on('exit', exited);
  });
}
