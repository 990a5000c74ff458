// One conversation's WebSocket, opened again with the same settings when it is lost.

import { VERSION, parseBlock, pictureMessage, speechMessage } from "./protocol.js";

const FIRST_WAIT_MS = 500;
const MOST_WAIT_MS = 8000;
const RETRIED = new Set(["lost", "no_server", "full"]);

export class Connection {
  /**
   * `settings` is { fields, picture } of session.start; `on` has the functions
   * connecting(), ready(message), block(block), recording(message), recorded(message), fault(message),
   * failed(message), lost(message, waitMs).
   */
  constructor(settings, on) {
    this.settings = settings;
    this.on = on;
    this.turn = 0;
    this.wasReady = false;
    this.isClosed = false;
    this.waitMs = FIRST_WAIT_MS;
    this.#open();
  }

  say(text) {
    this.#send(JSON.stringify({ type: "speech.text", text, turn: this.turn }));
  }

  speech(samples) {
    this.#send(speechMessage(samples, this.turn));
  }

  /** Begins a turn and returns its number. */
  interrupt() {
    this.turn += 1;
    this.#send(JSON.stringify({ type: "speech.interrupt", turn: this.turn }));
    return this.turn;
  }

  record() {
    this.#send(JSON.stringify({ type: "record.start" }));
  }

  close() {
    this.isClosed = true;
    clearTimeout(this.timer);
    this.socket.close();
  }

  #open() {
    this.on.connecting();
    this.turn = 0;
    this.isReady = false;
    this.error = null;
    const socket = new WebSocket(new URL("talk", location.href.replace(/^http/, "ws").replace(/#.*/, "")));
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => {
      const { fields, picture } = this.settings;
      socket.send(JSON.stringify({ type: "session.start", version: VERSION, ...fields }));
      if (picture) socket.send(pictureMessage(picture));
    };
    socket.onmessage = ({ data }) => this.#receive(data);
    socket.onclose = () => this.#closed();
  }

  #send(message) {
    if (this.isReady && this.socket.readyState === WebSocket.OPEN) this.socket.send(message);
  }

  #receive(data) {
    if (this.isClosed) return;
    if (data instanceof ArrayBuffer) {
      this.on.block(parseBlock(data));
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "session.ready") {
      this.isReady = true;
      this.wasReady = true;
      this.waitMs = FIRST_WAIT_MS;
      this.on.ready(message);
    } else if (message.type === "record.started") {
      this.on.recording(message);
    } else if (message.type === "record.ended") {
      this.on.recorded(message);
    } else if (message.type === "error") {
      if (message.ends) this.error = message;
      else this.on.fault(message);
    }
  }

  #closed() {
    this.isReady = false;
    if (this.isClosed) return;
    const error = this.error ?? { code: "lost", message: "the connection to the page's server was lost" };
    // A conversation that was under way is taken up again; one that never began is up to the visitor.
    if (!this.wasReady || !RETRIED.has(error.code)) {
      this.isClosed = true;
      this.on.failed(error);
      return;
    }
    this.on.lost(error, this.waitMs);
    this.timer = setTimeout(() => this.#open(), this.waitMs);
    this.waitMs = Math.min(MOST_WAIT_MS, this.waitMs * 2);
  }
}
