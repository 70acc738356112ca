/** What a check of an image found. */

/** Messages kept; a badly damaged image has millions. */
const MAX_MESSAGES = 100;

export class Findings {
  corruptions = 0;
  leaks = 0;
  /** Corruptions that counting references anew cannot mend. */
  structural = 0;
  /** Tables that cannot be followed: what they refer to is unknown, so no refcount may fall. */
  lost = 0;
  /** Clusters with fewer counts than references. */
  tooLow = 0;
  /** COPIED flags that are wrong whatever the refcounts: compressed clusters, external data. */
  flagsWrong = false;
  /** Guest clusters of the active disk with a place in the file, compressed ones among them. */
  allocatedClusters = 0;
  compressedClusters = 0;
  /** The highest cluster in use or counted as such; -1 if none. */
  highestCluster = -1;
  readonly messages: string[] = [];
  messagesLeftOut = 0;

  /** A wrong refcount or COPIED flag: counting anew mends it. */
  miscounted(text: string, times = 1): void {
    this.corruptions += times;
    this.#say(text);
  }

  /**
   * Two tables, or a table and data, in one cluster. `said`: its refcount is wrong, too, which is counted already, as
   * by QEMU, which sees an overlap only by that.
   */
  overlapping(text: string, said: boolean): void {
    this.structural++;
    if (!said) this.corruptions++;
    this.#say(text);
  }

  /** A damaged table or entry, referred to `times` times. */
  damaged(text: string, times = 1): void {
    this.corruptions += times;
    this.structural += times;
    this.#say(text);
  }

  leaked(text: string): void {
    this.leaks++;
    this.#say(text);
  }

  #say(text: string): void {
    if (this.messages.length < MAX_MESSAGES) this.messages.push(text);
    else this.messagesLeftOut++;
  }
}
