// What a visitor chooses for a conversation: the face, the prompt, the seed, the label and the key.

import { element } from "./view.js";

const OWN = ""; // value of the choice of one's own picture
let own = null;

/** Lists the server's portraits, and takes the key out of the address. */
export function offerFaces({ portraits, label, needs_key: needsKey }) {
  portraits.forEach((name) => addFace(name, name, `portraits/${encodeURIComponent(name)}`));
  const first = element("faces").querySelector("input");
  if (first) first.checked = true;
  element("label-text").textContent = label;
  element("key-field").hidden = !needsKey;
  element("key").value = new URLSearchParams(location.hash.slice(1)).get("key") ?? "";
}

/** Makes a picture of the visitor the chosen face: { bytes, url }. */
export function ownFace(picture) {
  if (own) URL.revokeObjectURL(own.url);
  own = picture;
  const choice = element("faces").querySelector(`input[value="${OWN}"]`) ?? addFace(OWN, "Yours", picture.url);
  choice.nextElementSibling.src = picture.url;
  choice.checked = true;
}

export function faceUrl() {
  return chosen()?.nextElementSibling.src ?? "";
}

/** Returns { fields, picture } of session.start. */
export function chosenFields({ label }) {
  const name = chosen()?.value ?? OWN;
  const fields = {
    portrait: name === OWN ? null : name,
    prompt: element("prompt").value,
    seed: Math.max(0, Math.round(Number(element("seed").value) || 0)),
    label: element("label").checked ? label : "",
    key: element("key").value,
  };
  return { fields, picture: name === OWN ? (own?.bytes ?? new ArrayBuffer(0)) : null };
}

function chosen() {
  return element("faces").querySelector("input:checked");
}

function addFace(value, name, url) {
  const label = document.createElement("label");
  const choice = Object.assign(document.createElement("input"), { type: "radio", name: "face", value });
  const image = Object.assign(document.createElement("img"), { src: url, alt: "" });
  label.append(choice, image, name);
  element("faces").append(label);
  return choice;
}
