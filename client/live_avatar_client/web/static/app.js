// The page: joins what the visitor does with the connection, the player and the microphone.

import { Connection } from "./connection.js";
import { showFigures } from "./figures.js";
import { readPicture, readSound, sendPaced } from "./files.js";
import { Gate } from "./gate.js";
import { Microphone, microphoneFault } from "./microphone.js";
import { Player } from "./player.js";
import { Recording } from "./recording.js";
import { chosenFields, faceUrl, offerFaces, ownFace } from "./settings.js";
import { element, notice, showRecording, showState, showUneven } from "./view.js";

const FIGURES_MS = 500;

/** All that a visit changes; tests read it. */
export const visit = {
  settings: null, // of the server
  connection: null,
  player: null,
  microphone: null,
  recording: null,
  gate: new Gate(),
  source: null, // of the speech of this turn: "text", "sound" or "microphone"
  isHeld: false,
  times: { start: 0, firstFrameMs: null, asked: null, latencyMs: null },
};

const isSpeaking = () => visit.player?.isSpeaking ?? false;

function start() {
  notice("");
  visit.player ??= new Player(element("video"), noteFrame);
  visit.player.resume();
  visit.player.restart();
  visit.player.muted = element("mute").getAttribute("aria-pressed") === "true";
  visit.times = { start: performance.now(), firstFrameMs: null, asked: null, latencyMs: null };
  visit.connection?.close();
  visit.connection = new Connection(chosenFields(visit.settings), {
    connecting: () => showState("connecting"),
    ready: () => {
      notice("");
      showState("ready");
    },
    block: (block) => visit.player.push(block),
    recording: ({ path }) => {
      visit.recording = new Recording(path);
      showRecording(visit.recording);
    },
    recorded: ({ message }) => saveRecording(message),
    fault: ({ message }) => notice(message),
    failed: (error) => end(error.code === "full" ? "full" : "failed", error.message),
    lost: ({ message }, waitMs) => {
      saveRecording("the conversation was lost");
      visit.player.restart();
      showState("lost");
      notice(message, `Connecting again in ${waitMs / 1000} s`);
    },
  });
  element("text").focus();
}

function end(state = "stopped", message = "") {
  saveRecording("the conversation has ended");
  visit.connection?.close();
  visit.connection = null;
  visit.player?.restart();
  closeMicrophone();
  showState(state);
  notice(message);
}

function noteFrame(frame) {
  const now = performance.now();
  const { times } = visit;
  times.firstFrameMs ??= now - times.start;
  if (frame.isSpeech && times.asked !== null) {
    times.latencyMs = now - times.asked;
    times.asked = null;
  }
}

/** Begins a turn: the avatar stops, and what waits to be said is forgotten. */
function interrupt() {
  if (!visit.connection?.isReady) return;
  visit.player.interrupt(visit.connection.interrupt());
  visit.times.asked = null;
  visit.source = null;
}

/** Notes when speech began that the avatar has yet to begin. */
function ask() {
  if (!isSpeaking()) visit.times.asked ??= performance.now();
}

/** Makes a source the one that speaks: another one is interrupted. */
function speakFrom(source) {
  if (visit.source !== null && visit.source !== source && isSpeaking()) interrupt();
  visit.source = source;
}

function say() {
  const text = element("text").value.trim();
  if (!text || !visit.connection?.isReady) return;
  notice("");
  speakFrom("text");
  ask();
  visit.connection.say(text);
  element("text").select();
}

async function saySound(file) {
  notice("");
  try {
    const samples = await readSound(file);
    const { connection } = visit;
    if (!connection?.isReady) return;
    interrupt();
    const { turn } = connection;
    visit.source = "sound";
    ask();
    await sendPaced(samples, (part) => connection.speech(part), () => connection.isReady && connection.turn === turn);
  } catch (error) {
    notice(error.message);
  }
}

function hear({ samples, loudness }) {
  const { gate, connection } = visit;
  if (!connection?.isReady) return;
  const isPush = element("push").checked;
  const wasOpen = gate.isOpen;
  if (isPush && !visit.isHeld) {
    gate.close();
    return;
  }
  const speech = gate.add(samples, loudness, isSpeaking(), isPush);
  if (gate.isOpen && !wasOpen) {
    speakFrom("microphone");
    ask();
  }
  for (const chunk of speech) connection.speech(chunk);
}

async function toggleMicrophone() {
  if (visit.microphone) {
    closeMicrophone();
    return;
  }
  notice("");
  try {
    visit.microphone = await Microphone.open(hear);
  } catch (error) {
    notice(microphoneFault(error));
  }
  showMicrophone();
}

function closeMicrophone() {
  visit.microphone?.close();
  visit.microphone = null;
  visit.gate.close();
  showMicrophone();
}

function showMicrophone() {
  element("microphone").setAttribute("aria-pressed", String(visit.microphone !== null));
  element("hold").hidden = visit.microphone === null || !element("push").checked;
}

function hold(isHeld) {
  visit.isHeld = isHeld;
  element("hold").classList.toggle("held", isHeld);
}

function toggleMute() {
  const isMuted = element("mute").getAttribute("aria-pressed") !== "true";
  element("mute").setAttribute("aria-pressed", String(isMuted));
  if (visit.player) visit.player.muted = isMuted;
}

function toggleRecording() {
  if (visit.recording) saveRecording();
  else if (visit.connection?.isReady) visit.connection.record();
}

/** Ends the recording, if there is one; `reason` is for one that the visitor did not end. */
async function saveRecording(reason = "") {
  const { recording } = visit;
  if (!recording) return;
  visit.recording = null;
  showRecording(null, reason, "saving the recording …");
  try {
    showRecording(null, reason, `saved ${await recording.save()}`);
  } catch (error) {
    showRecording(null, reason, error.message);
  }
}

/** The state follows what is heard, while there is a conversation. */
function refresh() {
  if (visit.connection?.isReady) {
    showState(isSpeaking() ? "speaking" : visit.microphone ? "listening" : "ready");
  }
  showUneven(visit.connection?.isReady && visit.player.isUneven);
  if (visit.recording) showRecording(visit.recording);
  if (element("measured").open && visit.player) showFigures(element("figures"), visit);
}

const isTyping = (target) => target.matches("textarea, input:not([type=checkbox], [type=radio], [type=file])");

function keyDown(event) {
  if (event.key === "Escape") {
    interrupt();
  } else if (event.key === "Enter" && event.target === element("text") && !event.shiftKey) {
    event.preventDefault();
    say();
  } else if (isTyping(event.target) || event.ctrlKey || event.metaKey || event.altKey) {
    // the key belongs to what is typed, or to the browser
  } else if (event.key === "m") {
    toggleMute();
  } else if (event.key === "r") {
    toggleRecording();
  } else if (event.key === " " && visit.microphone && element("push").checked) {
    event.preventDefault();
    hold(true);
  }
}

function listen() {
  element("start").addEventListener("click", start);
  element("stop").addEventListener("click", () => end());
  element("interrupt").addEventListener("click", interrupt);
  element("microphone").addEventListener("click", toggleMicrophone);
  element("mute").addEventListener("click", toggleMute);
  element("record").addEventListener("click", toggleRecording);
  element("push").addEventListener("change", showMicrophone);
  element("hold").addEventListener("pointerdown", () => hold(true));
  addEventListener("pointerup", () => hold(false));
  addEventListener("keydown", keyDown);
  addEventListener("keyup", ({ key }) => key === " " && hold(false));
  addEventListener("blur", () => hold(false));
  document.addEventListener("visibilitychange", () => {
    visit.times.asked = null; // the first frame would be drawn when the tab is shown again
  });
  element("typed").addEventListener("submit", (event) => {
    event.preventDefault();
    say();
  });
  element("sound").addEventListener("change", async ({ target }) => {
    if (target.files.length) await saySound(target.files[0]);
    target.value = "";
  });
  element("picture").addEventListener("change", async ({ target }) => {
    if (!target.files.length) return;
    try {
      ownFace(await readPicture(target.files[0]));
      showFace();
    } catch (error) {
      notice(error.message);
    }
    target.value = "";
  });
  element("faces").addEventListener("change", showFace);
  setInterval(refresh, FIGURES_MS / 5);
}

/** Shows the chosen face where the video will be. */
function showFace() {
  if (visit.connection) return;
  const image = new Image();
  image.onload = () => {
    if (visit.connection) return;
    const canvas = element("video");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.getContext("2d").drawImage(image, 0, 0);
  };
  image.src = faceUrl();
}

async function open() {
  showState("stopped");
  listen();
  try {
    visit.settings = await (await fetch("settings.json")).json();
  } catch {
    end("failed", "The page's server does not answer. Start it, and load the page again.");
    return;
  }
  offerFaces(visit.settings);
  showFace();
  element("text").maxLength = visit.settings.max_text_chars;
}

open();
