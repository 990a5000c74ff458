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
const NEEDS_LIVE = ["interrupt", "microphone", "say", "sound", "record"];

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
export const notice = (...sentences) => tell("notice", sentences);

/** Shows how long a recording is, or without one the sentences of its end. */
export function showRecording(recording, ...sentences) {
  element("record").setAttribute("aria-pressed", String(recording !== null));
  const { firstChild: name } = element("record");
  const seconds = recording?.seconds;
  const text = recording ? `Save ${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")} ` : "Record ";
  if (name.textContent !== text) name.textContent = text;
  tell("recorded", recording ? ["recording what the avatar says and shows"] : sentences);
}

/** Shows why the picture is late, if blocks come unevenly. */
export const showUneven = (isUneven) =>
  tell("uneven", [isUneven && "the video comes in bursts or too slowly, so it is shown up to a second later"]);

function tell(id, sentences) {
  const text = sentences.filter(Boolean).map(asSentence).join(" ");
  const place = element(id);
  if (place.textContent !== text) place.textContent = text; // what is shown already is not announced again
  place.hidden = !text;
}

const asSentence = (text) => `${text[0].toUpperCase()}${text.slice(1).replace(/\.$/, "")}.`;
