// What the page shows besides the picture: the state in words, a notice, and which buttons can be pressed.

const WORDS = {
  stopped: "Stopped",
  connecting: "Connecting …",
  ready: "Ready: type, speak or choose a sound file",
  listening: "Listening",
  speaking: "Speaking",
  full: "Full: all places are taken",
  lost: "Connection lost",
  failed: "Not possible",
};
const LIVE = new Set(["ready", "listening", "speaking"]);
const NEEDS_LIVE = ["interrupt", "microphone", "say", "sound"];

export const element = (id) => document.getElementById(id);

/** Shows a state; one that is shown already is not announced again. */
export function showState(state) {
  const { dataset } = document.body;
  if (dataset.state === state && element("state").textContent === WORDS[state]) return;
  dataset.state = state;
  element("state").textContent = WORDS[state];
  for (const id of NEEDS_LIVE) element(id).disabled = !LIVE.has(state);
  element("stop").disabled = !LIVE.has(state) && state !== "connecting" && state !== "lost";
  element("start").textContent = state === "stopped" ? "Start" : "Try again";
}

/** Shows sentences for the visitor, or none. */
export function notice(...sentences) {
  const text = sentences.filter(Boolean).map(asSentence).join(" ");
  element("notice").textContent = text;
  element("notice").hidden = !text;
}

const asSentence = (text) => `${text[0].toUpperCase()}${text.slice(1).replace(/\.$/, "")}.`;
