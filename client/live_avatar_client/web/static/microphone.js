// The microphone, at whatever rate the device has.

const REASONS = {
  NotAllowedError: "The browser does not allow the microphone. Allow it in the address bar, or type a text.",
  NotFoundError: "No microphone was found. Plug one in, or type a text.",
  NotReadableError: "The microphone is in use by another program. Close that program, or type a text.",
};

/** Why the microphone cannot be used, in a sentence. */
export function microphoneFault(error) {
  return REASONS[error.name] ?? `The microphone cannot be used: ${error.message}. Type a text instead.`;
}

export class Microphone {
  /** Opens the microphone; `onChunk` gets { samples: Int16Array of 40 ms at 16 kHz, loudness }. */
  static async open(onChunk) {
    if (!navigator.mediaDevices) {
      throw new Error("the page needs https, or an address of this machine");
    }
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true },
    });
    const context = new AudioContext();
    try {
      await context.audioWorklet.addModule("capture.js");
    } catch (error) {
      stream.getTracks().forEach((track) => track.stop());
      await context.close();
      throw error;
    }
    const node = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
    node.port.onmessage = ({ data }) => onChunk(data);
    context.createMediaStreamSource(stream).connect(node);
    await context.resume();
    return new Microphone(stream, context);
  }

  constructor(stream, context) {
    this.stream = stream;
    this.context = context;
  }

  close() {
    this.stream.getTracks().forEach((track) => track.stop());
    return this.context.close();
  }
}
