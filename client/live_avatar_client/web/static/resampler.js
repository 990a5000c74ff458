// Changes the rate of sound that comes in chunks, by one windowed sinc over all of them. It runs in the microphone's
// AudioWorklet, on any rate of the device.

const ZERO_CROSSINGS = 16;
const PASS = 0.94; // share of the lower Nyquist frequency that passes
const PHASES = 512; // of the table of the filter, between which is interpolated

export class Resampler {
  constructor(fromHz, toHz) {
    this.step = fromHz / toHz;
    const cutoff = PASS * Math.min(1, toHz / fromHz);
    this.reach = Math.ceil(ZERO_CROSSINGS / cutoff);
    this.table = filterTable(cutoff, this.reach);
    this.held = new Float32Array(this.reach);
    this.heldFrom = -this.reach; // place of the first held sample in the whole sound
    this.made = 0;
  }

  /** Returns the samples that become known with this chunk, in [-1, 1]. */
  add(chunk) {
    const all = new Float32Array(this.held.length + chunk.length);
    all.set(this.held);
    all.set(chunk, this.held.length);
    const last = this.heldFrom + all.length - 1 - this.reach;
    const stop = Math.floor(last / this.step) + 1;
    const made = new Float32Array(Math.max(0, stop - this.made));
    for (let i = 0; i < made.length; i += 1) {
      const place = (this.made + i) * this.step;
      const nearest = Math.floor(place);
      made[i] = this.#sample(all, nearest - this.heldFrom, place - nearest);
    }
    this.made += made.length;
    const needed = Math.floor(this.made * this.step) - this.reach + 1;
    const drop = Math.max(0, Math.min(all.length, needed - this.heldFrom));
    this.held = all.slice(drop);
    this.heldFrom += drop;
    return made;
  }

  #sample(all, at, fraction) {
    const { reach, table } = this;
    const position = fraction * PHASES;
    const phase = Math.floor(position);
    const part = position - phase;
    const row = phase * 2 * reach;
    let sum = 0;
    for (let k = 0; k < 2 * reach; k += 1) {
      const tap = table[row + k] + part * (table[row + 2 * reach + k] - table[row + k]);
      sum += tap * all[at + k - reach + 1];
    }
    return sum;
  }
}

/** Rows of 2 * reach taps, for fractions 0, 1 / PHASES, ... 1. */
function filterTable(cutoff, reach) {
  const table = new Float32Array((PHASES + 1) * 2 * reach);
  for (let phase = 0; phase <= PHASES; phase += 1) {
    for (let k = 0; k < 2 * reach; k += 1) {
      const distance = phase / PHASES - (k - reach + 1);
      const x = Math.PI * cutoff * distance;
      const window = Math.cos((Math.PI / 2) * Math.max(-1, Math.min(1, distance / (reach + 1)))) ** 2;
      table[phase * 2 * reach + k] = cutoff * (x === 0 ? 1 : Math.sin(x) / x) * window;
    }
  }
  return table;
}
