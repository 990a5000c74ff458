// The microphone's AudioWorklet: mixes to mono, resamples to 16 kHz, and posts chunks of 40 ms with their loudness.

import { FRAME_SAMPLES, RATE_HZ } from "./protocol.js";
import { Resampler } from "./resampler.js";

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE_HZ);
    this.chunk = new Int16Array(FRAME_SAMPLES);
    this.filled = 0;
    this.energy = 0;
  }

  process([channels]) {
    if (channels?.length) for (const sample of this.resampler.add(mono(channels))) this.#add(sample);
    return true;
  }

  #add(sample) {
    const clipped = Math.max(-1, Math.min(1, sample));
    this.energy += clipped * clipped;
    this.chunk[this.filled] = Math.round(clipped * 32767);
    this.filled += 1;
    if (this.filled < FRAME_SAMPLES) return;
    this.port.postMessage({ samples: this.chunk.slice(), loudness: Math.sqrt(this.energy / FRAME_SAMPLES) });
    this.filled = 0;
    this.energy = 0;
  }
}

function mono(channels) {
  if (channels.length === 1) return channels[0];
  return channels[0].map((_, i) => channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length);
}

registerProcessor("capture", Capture);
