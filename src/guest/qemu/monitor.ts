/** QEMU's QMP socket, connected for as long as someone here uses it, and by all of them together: it serves one client. */
import { QmpClient } from './qmp-client.ts';

export class Monitor {
  readonly path: string;
  #connecting: Promise<QmpClient> | undefined;
  #users = 0;

  constructor(path: string) {
    this.path = path;
  }

  /** @throws FsError what connecting and `work` throw */
  async use<T>(work: (qmp: QmpClient) => Promise<T>): Promise<T> {
    this.#users++;
    try {
      return await work(await this.#client());
    } finally {
      if (--this.#users === 0) this.#drop();
    }
  }

  #client(): Promise<QmpClient> {
    if (this.#connecting !== undefined) return this.#connecting;
    const connecting = QmpClient.connect(this.path);
    this.#connecting = connecting;
    const forget = () => {
      if (this.#connecting === connecting) this.#connecting = undefined;
    };
    connecting.then((client) => client.ended.then(forget), forget);
    return connecting;
  }

  #drop(): void {
    void this.#connecting?.then(
      (client) => client[Symbol.dispose](),
      () => {}, // whoever asked for it was told
    );
    this.#connecting = undefined;
  }
}
