// The messages of the WebSocket, as docs/web.md describes them.

export const VERSION = 1;
export const RATE_HZ = 16000;
export const FPS = 25;
export const FRAME_S = 1 / FPS;
export const FRAME_SAMPLES = RATE_HZ / FPS;

const PICTURE = 1;
const SPEECH = 2;
const BLOCK = 3;
const SPEECH_HEADER_BYTES = 8;
const BLOCK_HEADER_BYTES = 16;

/** The message that carries a picture: its bytes behind the kind. */
export function pictureMessage(bytes) {
  const message = new Uint8Array(1 + bytes.byteLength);
  message[0] = PICTURE;
  message.set(new Uint8Array(bytes), 1);
  return message;
}

/** The message that carries speech of a turn: Int16Array at 16 kHz. */
export function speechMessage(samples, turn) {
  const message = new Uint8Array(SPEECH_HEADER_BYTES + samples.byteLength);
  message[0] = SPEECH;
  new DataView(message.buffer).setUint32(4, turn, true);
  message.set(new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength), SPEECH_HEADER_BYTES);
  return message;
}

/** A block of the server: its frames as JPEG files, and their sound. */
export function parseBlock(buffer) {
  const view = new DataView(buffer);
  if (buffer.byteLength < BLOCK_HEADER_BYTES || view.getUint8(0) !== BLOCK) {
    throw new Error("a binary message is no block; the server is of another version");
  }
  const count = view.getUint16(2, true);
  const soundBytes = view.getUint32(12, true);
  const soundAt = BLOCK_HEADER_BYTES + 4 * count;
  const jpegs = [];
  let at = soundAt + soundBytes;
  for (let i = 0; i < count; i += 1) {
    const size = view.getUint32(BLOCK_HEADER_BYTES + 4 * i, true);
    jpegs.push(new Uint8Array(buffer, at, size));
    at += size;
  }
  return {
    isSpeech: view.getUint8(1) !== 0,
    turn: view.getUint32(4, true),
    firstFrame: view.getUint32(8, true),
    sound: new Int16Array(buffer, soundAt, soundBytes / 2),
    jpegs,
  };
}
