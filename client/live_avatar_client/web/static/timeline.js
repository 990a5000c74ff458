// Places blocks on the clock of the sound card. It knows no sound and no picture, only times in seconds. A message has a
// third of a block of the server, the frames of one latent.
//
// The server's clock and the sound card's differ by some seconds in a night. So the distance between now and the block
// that arrives drifts. It is brought back where nobody hears it: frames of silence are left out, or a pause is made.

import { FRAME_S } from "./protocol.js";

const LEAST_S = 0.01; // a block that would begin earlier than this is late
const FIRST_TARGET_S = 0.08;
const MOST_TARGET_S = 1.0;
const STEP_S = 0.04; // least rise of the target
const FALL_S = 0.02; // least fall
const SLACK_S = 0.24; // how far the distance may be above the target
const WINDOW = 24; // messages whose least distance counts
const MOST_SKIPPED = 2; // frames of one message
const CALM = 180; // messages without a late one, after which the target shrinks

export class Timeline {
  constructor() {
    this.targetS = FIRST_TARGET_S;
    this.late = 0; // blocks that came too late
    this.skipped = 0; // frames of silence that were left out
    this.leadS = 0; // distance of the last block
    this.restart();
  }

  /** Forget what was placed; the next block begins as soon as the target allows. */
  restart() {
    this.nextS = null;
    this.leads = [];
    this.#beginCalm();
  }

  #beginCalm() {
    this.calm = 0;
    this.leastS = Infinity; // distance of the latest block since then
  }

  /**
   * Place a block of `frames` frames that arrives at `nowS`; `isSilent` says whether frames may be left out.
   * Returns when it begins, and how many of its first frames are left out.
   */
  place(frames, nowS, isSilent) {
    if (this.nextS === null) {
      this.nextS = nowS + this.targetS;
    } else if (this.nextS - nowS < LEAST_S) {
      this.#noteLate(nowS);
    } else {
      this.#noteInTime(nowS);
    }
    this.leadS = this.nextS - nowS;
    const skip = this.#surplus(frames, isSilent);
    const atS = this.nextS;
    this.nextS += (frames - skip) * FRAME_S;
    return { atS, skip };
  }

  /** Let the next block begin as soon as the target allows, before others that were placed; returns that time. */
  hurry(nowS) {
    if (this.nextS === null || this.nextS <= nowS + this.targetS) return Infinity;
    const leftOut = Math.floor((this.nextS - nowS - this.targetS) / FRAME_S);
    this.nextS -= leftOut * FRAME_S;
    this.skipped += leftOut;
    this.leads = [];
    return this.nextS;
  }

  #noteLate(nowS) {
    this.late += 1;
    this.#beginCalm();
    this.targetS = Math.min(MOST_TARGET_S, this.targetS + Math.max(STEP_S, nowS - this.nextS));
    this.nextS = nowS + this.targetS;
    this.leads = [];
  }

  #noteInTime(nowS) {
    this.calm += 1;
    this.leastS = Math.min(this.leastS, this.nextS - nowS);
    if (this.calm < CALM) return;
    // Half of what no block has needed; the other half is kept for the next that is late.
    this.targetS = Math.max(FIRST_TARGET_S, this.targetS - Math.max(FALL_S, this.leastS / 2));
    this.#beginCalm();
  }

  #surplus(frames, isSilent) {
    this.leads.push(this.leadS);
    if (this.leads.length > WINDOW) this.leads.shift();
    const surplusS = Math.min(...this.leads) - this.targetS;
    if (!isSilent || this.leads.length < WINDOW || surplusS < SLACK_S) return 0;
    // After a burst, as behind a tab that was asleep, silence is left out whole.
    const most = surplusS > MOST_TARGET_S ? frames : MOST_SKIPPED;
    const skip = Math.min(most, frames, Math.floor(surplusS / FRAME_S));
    this.leads = this.leads.map((leadS) => leadS - skip * FRAME_S);
    this.skipped += skip;
    return skip;
  }
}
