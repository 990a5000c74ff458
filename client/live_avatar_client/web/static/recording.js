// Saves what is shown as an MP4 file, which the page's server makes.

const TRIES = 20;
const WAIT_MS = 1000;

export class Recording {
  /** `path` is where the server has the file. */
  constructor(path) {
    this.path = path;
    this.startedMs = performance.now();
  }

  get seconds() {
    return Math.floor((performance.now() - this.startedMs) / 1000);
  }

  /** Ends the recording and hands the file to the visitor; returns the file's name. */
  async save() {
    const file = await fetched(this.path);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(file);
    link.download = `avatar-${new Date().toISOString().slice(0, 19).replace(/[-:]/g, "").replace("T", "-")}.mp4`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser reads it a little later
    return link.download;
  }
}

/** The file at a path. Without a network it is tried again, as the server keeps the file for a minute. */
async function fetched(path) {
  for (let tried = 1; ; tried += 1) {
    try {
      const answer = await fetch(path, { method: "POST" });
      if (answer.ok) return await answer.blob();
      throw new Refusal((await answer.json()).message);
    } catch (error) {
      if (error instanceof Refusal) throw error;
      if (tried === TRIES) throw new Error("the page's server does not answer, so the recording is lost");
    }
    await new Promise((resolve) => setTimeout(resolve, WAIT_MS));
  }
}

class Refusal extends Error {}
