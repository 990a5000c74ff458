// Plays blocks: sound on an AudioContext, and each frame when its sound is heard.
//
// There is one clock, that of the sound card. The context runs at the rate of the speech, so that the browser resamples
// its whole output once, without seams between blocks.

import { FRAME_S, FRAME_SAMPLES, RATE_HZ } from "./protocol.js";
import { Timeline } from "./timeline.js";

const FADE_S = 0.015;
const QUIET_S = 0.6; // without a block of speech the avatar is silent
const MOST_WAITING = 250; // frames: ten seconds, while the sound does not run
const UNEVEN_S = 0.4;
const OFFSETS = 250; // frames over which sync is measured
const FIRST_REFRESH_S = 1 / 60;

export class Player {
  /** `onFrame` is told of each frame that is drawn: { number, isSpeech, turn, offsetS }. */
  constructor(canvas, onFrame) {
    this.canvas = canvas;
    this.picture = canvas.getContext("2d");
    this.onFrame = onFrame;
    this.context = new AudioContext({ sampleRate: RATE_HZ, latencyHint: "interactive" });
    this.volume = this.context.createGain();
    this.volume.connect(this.context.destination);
    this.turn = 0;
    this.isOpen = true;
    this.refreshS = FIRST_REFRESH_S;
    this.#reset();
    requestAnimationFrame((timeMs) => this.#draw(timeMs));
  }

  #reset() {
    this.timeline = new Timeline();
    this.frames = [];
    this.spoken = []; // { fromS, toS } of blocks of speech that are or will be heard
    this.offsets = [];
    this.drawn = 0;
    this.undrawn = 0; // frames whose time passed before they could be drawn
    this.drawnTimes = [];
    this.#openBus();
  }

  /** Forget what was played, for a new session. */
  restart() {
    this.#silence();
    this.turn = 0;
    this.#reset();
  }

  /** Allow sound; browsers want a click or a key for it. */
  resume() {
    return this.context.resume();
  }

  set muted(isMuted) {
    this.volume.gain.setTargetAtTime(isMuted ? 0 : 1, this.context.currentTime, FADE_S / 3);
  }

  /** Begin a turn: what waits is not played, and the sound ends at once. */
  interrupt(turn) {
    this.turn = turn;
    this.spoken = [];
    this.#silence();
    this.#openBus();
    this.timeline.restart();
  }

  /** Take a block; one of an older turn is ignored. */
  push(block) {
    if (block.turn < this.turn) return;
    if (block.isSpeech) this.#dropWaitingSilence();
    const { atS, skip } = this.timeline.place(block.jpegs.length, this.context.currentTime, !block.isSpeech);
    const sound = block.sound.subarray(skip * FRAME_SAMPLES);
    if (block.isSpeech) {
      this.#play(sound, atS); // silence needs no sound
      this.spoken.push({ fromS: atS, toS: atS + (block.jpegs.length - skip) * FRAME_S });
    }
    block.jpegs.slice(skip).forEach((jpeg, i) => this.#take(block, skip + i, jpeg, atS + i * FRAME_S));
    while (this.frames.length > MOST_WAITING) this.frames.shift().bitmap?.close();
  }

  /** Speech that follows silence is not kept waiting by it: the silent frames before it are left out. */
  #dropWaitingSilence() {
    if (this.frames.some((frame) => frame.isSpeech)) return;
    const beginS = this.timeline.hurry(this.context.currentTime);
    const kept = this.frames.filter((frame) => frame.atS < beginS);
    this.frames.slice(kept.length).forEach((frame) => frame.bitmap?.close());
    this.frames = kept;
  }

  close() {
    this.isOpen = false;
    this.#silence();
    return this.context.close();
  }

  #openBus() {
    this.bus = this.context.createGain();
    this.bus.connect(this.volume);
    this.sources = new Set();
  }

  #silence() {
    const endS = this.context.currentTime + FADE_S;
    this.bus.gain.setValueAtTime(1, this.context.currentTime);
    this.bus.gain.linearRampToValueAtTime(0, endS);
    for (const source of this.sources) source.stop(endS);
    for (const frame of this.frames) frame.bitmap?.close();
    this.frames = [];
  }

  #play(sound, atS) {
    const buffer = this.context.createBuffer(1, sound.length, RATE_HZ);
    buffer.copyToChannel(Float32Array.from(sound, (sample) => sample / 32768), 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.bus);
    const sources = this.sources;
    sources.add(source);
    source.onended = () => {
      sources.delete(source);
      source.disconnect();
    };
    source.start(atS);
  }

  async #take(block, i, jpeg, atS) {
    const frame = { number: block.firstFrame + i, isSpeech: block.isSpeech, turn: block.turn, atS, bitmap: null };
    this.frames.push(frame);
    try {
      frame.bitmap = await createImageBitmap(new Blob([jpeg], { type: "image/jpeg" }));
    } catch {
      frame.bitmap = null; // the picture before it is held
    }
  }

  /** Whether speech is heard now, or was a moment ago. Frames do not tell: a tab in the background draws none. */
  get isSpeaking() {
    const heardS = this.heardAt(performance.now());
    while (this.spoken.length && this.spoken[0].toS + QUIET_S < heardS) this.spoken.shift();
    return this.spoken.length > 0 && this.spoken[0].fromS <= heardS;
  }

  /** Whether blocks come so unevenly that the picture is much later than it could be. */
  get isUneven() {
    return this.timeline.targetS >= UNEVEN_S;
  }

  /** The time of the context that is heard at a time of the page's clock. */
  heardAt(timeMs) {
    const stamp = this.context.getOutputTimestamp?.();
    if (stamp && stamp.contextTime > 0 && stamp.performanceTime > 0) {
      return stamp.contextTime + (timeMs - stamp.performanceTime) / 1000;
    }
    return this.context.currentTime - (this.context.outputLatency || this.context.baseLatency || 0);
  }

  #draw(timeMs) {
    if (!this.isOpen) return;
    requestAnimationFrame((nextMs) => this.#draw(nextMs));
    const passedS = (timeMs - (this.drawnAtMs ?? timeMs)) / 1000;
    this.drawnAtMs = timeMs;
    if (passedS > 0 && passedS < 0.1) this.refreshS += (passedS - this.refreshS) / 20;
    if (this.context.state !== "running") return;
    const heardS = this.heardAt(timeMs);
    // The frame is seen for one refresh of the screen: half of it early and half of it late is the least offset.
    const dueS = heardS + this.refreshS / 2;
    let due = null;
    while (this.frames.length && this.frames[0].atS <= dueS) {
      if (due) this.undrawn += 1;
      due?.bitmap?.close();
      due = this.frames.shift();
    }
    if (due?.bitmap) this.#show(due, heardS - due.atS, timeMs);
    else if (due) this.undrawn += 1;
  }

  #show(frame, offsetS, timeMs) {
    const { canvas, picture } = this;
    const { bitmap } = frame;
    if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
      canvas.width = bitmap.width;
      canvas.height = bitmap.height;
    }
    picture.drawImage(bitmap, 0, 0);
    bitmap.close();
    this.drawn += 1;
    this.offsets.push(offsetS);
    if (this.offsets.length > OFFSETS) this.offsets.shift();
    this.drawnTimes.push(timeMs);
    while (this.drawnTimes[0] < timeMs - 2000) this.drawnTimes.shift();
    this.onFrame({ number: frame.number, isSpeech: frame.isSpeech, turn: frame.turn, offsetS });
  }

  /** What is measured, over the last ten seconds of frames where not said otherwise. */
  figures(nowMs) {
    const sizes = this.offsets.map(Math.abs).sort((one, other) => one - other);
    const recent = this.drawnTimes.filter((timeMs) => timeMs > nowMs - 2000);
    const mean = this.offsets.reduce((sum, offsetS) => sum + offsetS, 0) / (this.offsets.length || 1);
    return {
      fps: recent.length / 2,
      syncMeanMs: mean * 1000,
      syncP95Ms: sizes.length ? sizes[Math.floor(0.95 * (sizes.length - 1))] * 1000 : 0,
      syncMostMs: sizes.length ? sizes[sizes.length - 1] * 1000 : 0,
      bufferMs: this.timeline.nextS === null ? 0 : Math.max(0, this.timeline.nextS - this.context.currentTime) * 1000,
      targetMs: this.timeline.targetS * 1000,
      late: this.timeline.late,
      skipped: this.timeline.skipped,
      drawn: this.drawn,
      undrawn: this.undrawn,
    };
  }
}
