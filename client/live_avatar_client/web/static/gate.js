// Decides by loudness when somebody speaks: above three times the noise, for 80 ms; until 0.4 s of quiet.
//
// It takes every loud sound for speech: music, a door, or the avatar itself from a loudspeaker, which the browser's
// echo cancellation removes only in part. So while the avatar is heard, twice the loudness is needed.

const LEAST_LOUDNESS = 0.01; // of full scale 1
const ABOVE_NOISE = 3;
const WHILE_HEARD = 2;
const OPENING = 2; // loud chunks
const CLOSING = 10; // quiet chunks
const BEFORE = 4; // chunks before the first loud one that belong to speech
const FALL = 0.2;
const RISE = 0.004;

export class Gate {
  constructor() {
    this.isOpen = false;
    this.noise = LEAST_LOUDNESS / ABOVE_NOISE;
    this.loud = 0;
    this.quiet = 0;
    this.before = [];
  }

  /** Takes a chunk and returns those that are speech now; `isHeld` opens the gate by hand. */
  add(samples, loudness, isAvatarHeard, isHeld = false) {
    const limit = Math.max(LEAST_LOUDNESS, ABOVE_NOISE * this.noise) * (isAvatarHeard ? WHILE_HEARD : 1);
    const isLoud = isHeld || loudness > limit;
    this.noise += (loudness < this.noise ? FALL : RISE) * (loudness - this.noise);
    this.loud = isLoud ? this.loud + 1 : 0;
    this.quiet = isLoud ? 0 : this.quiet + 1;
    if (this.isOpen) {
      if (this.quiet >= CLOSING) this.isOpen = false;
      return [samples];
    }
    this.before.push(samples);
    if (this.loud >= OPENING || isHeld) {
      this.isOpen = true;
      return this.before.splice(0);
    }
    if (this.before.length > BEFORE + OPENING) this.before.shift();
    return [];
  }

  /** Closes at once, as when a key is let go. */
  close() {
    this.isOpen = false;
    this.loud = 0;
    this.before = [];
  }
}
