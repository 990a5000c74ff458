// A visitor's own files: sound becomes speech at 16 kHz, a picture becomes no larger than is of use.

import { RATE_HZ } from "./protocol.js";

const MOST_SOUND_BYTES = 200e6;
const MOST_SOUND_S = 600;
const MOST_PIXELS_A_SIDE = 1280;
const JPEG_QUALITY = 0.95;
const CHUNK_S = 0.5;
const AHEAD_S = 3;

/** Decodes a sound file of any rate to Int16Array, mono, 16 kHz. */
export async function readSound(file) {
  if (file.size > MOST_SOUND_BYTES) {
    throw new Error(`The sound file has ${Math.round(file.size / 1e6)} MB. Choose one of at most 200 MB.`);
  }
  const context = new OfflineAudioContext(1, 1, RATE_HZ);
  let decoded;
  try {
    decoded = await context.decodeAudioData(await file.arrayBuffer()); // resampled to the context's rate
  } catch {
    throw new Error("The browser cannot read this sound file. Choose a WAV, MP3, Ogg or M4A file.");
  }
  if (decoded.duration > MOST_SOUND_S) {
    throw new Error(`The sound lasts ${Math.round(decoded.duration)} s. Choose one of at most ${MOST_SOUND_S} s.`);
  }
  const samples = new Int16Array(decoded.length);
  const channels = Array.from({ length: decoded.numberOfChannels }, (_, i) => decoded.getChannelData(i));
  for (let i = 0; i < samples.length; i += 1) {
    const mean = channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
    samples[i] = Math.round(Math.max(-1, Math.min(1, mean)) * 32767);
  }
  return samples;
}

/** Hands samples to `send` as they are spoken, some seconds ahead, as long as `isWanted()`. */
export async function sendPaced(samples, send, isWanted) {
  const startedMs = performance.now();
  const size = CHUNK_S * RATE_HZ;
  for (let at = 0; at < samples.length; at += size) {
    const earlyMs = (at / RATE_HZ - AHEAD_S) * 1000 - (performance.now() - startedMs);
    if (earlyMs > 0) await new Promise((resolve) => setTimeout(resolve, earlyMs));
    if (!isWanted()) return;
    send(samples.subarray(at, at + size));
  }
}

/** Reads a picture of any size and turns it upright; returns the bytes of a JPEG file. */
export async function readPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error("The browser cannot read this picture. Choose a PNG, JPEG or WebP file.");
  }
  const scale = Math.min(1, MOST_PIXELS_A_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const drawing = canvas.getContext("2d");
  drawing.fillStyle = "white"; // behind transparent parts
  drawing.fillRect(0, 0, canvas.width, canvas.height);
  drawing.imageSmoothingQuality = "high";
  drawing.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", JPEG_QUALITY));
  return { bytes: await blob.arrayBuffer(), url: URL.createObjectURL(blob) };
}
