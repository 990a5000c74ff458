"""Chromium, driven by playwright, and what it records of a page."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright

from live_avatar.arrays import Array

PROGRAM = shutil.which("chromium")
PATIENCE_MS = 120_000
WINDOW = 512
"""Samples of sound that are recorded with each frame."""

# Keeps each block that comes, and with each frame that is drawn its picture and the last samples that were played.
RECORD = """async ({ window, pictures }) => {
  const { visit } = await import("/app.js");
  const { player } = visit;
  const analyser = new AnalyserNode(player.context, { fftSize: window });
  player.volume.connect(analyser);
  globalThis.record = { blocks: [], frames: [] };
  const { push, onFrame } = player;
  player.push = (block) => {
    globalThis.record.blocks.push({ first: block.firstFrame, turn: block.turn, sound: Array.from(block.sound) });
    push.call(player, block);
  };
  player.onFrame = (frame) => {
    onFrame(frame);
    const played = new Float32Array(window);
    analyser.getFloatTimeDomainData(played);
    globalThis.record.frames.push({
      ...frame,
      playedBeforeHeardS: player.context.currentTime - player.heardAt(player.drawnAtMs),
      played: Array.from(played),
      picture: pictures ? player.canvas.toDataURL("image/png") : null,
    });
  };
}"""


TAKE = """() => {
  const { record } = globalThis;
  globalThis.record = { blocks: [], frames: [] };
  return record;
}"""


@dataclass
class Tab:
    """A page in the browser, and what its console has said."""

    page: Page
    said: list[str] = field(default_factory=list)

    def note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.said.append(message.text)

    def start(self) -> None:
        self.page.click("#start")
        self.await_state("ready")

    def await_state(self, *states: str) -> None:
        # No function is awaited: the page's policy does not allow the browser to evaluate it.
        self.page.wait_for_selector(",".join(f'body[data-state="{state}"]' for state in states), timeout=PATIENCE_MS)

    def say(self, text: str) -> None:
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def call(self, expression: str, argument: Any = None) -> Any:
        """The value of an expression of the page's `visit`."""
        code = f'async (argument) => {{ const {{ visit }} = await import("/app.js"); return {expression}; }}'
        return self.page.evaluate(code, argument)

    def notice(self) -> str:
        return self.page.inner_text("#notice")

    def record(self, pictures: bool = False) -> None:
        self.page.evaluate(RECORD, {"window": WINDOW, "pictures": pictures})

    def recorded(self) -> dict[str, Any]:
        """What has come since the last call: `blocks` and `frames`."""
        taken: dict[str, Any] = self.page.evaluate(TAKE)
        return taken


@contextmanager
def chromium(playwright: Playwright, sound: Path | None = None) -> Iterator[Browser]:
    """A browser whose microphone hears a WAV file, over and over; without one it has no permission."""
    microphone = (
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={sound}",
    )
    # Root has no sandbox; the pages are our own.
    arguments = ["--no-sandbox", *(() if sound is None else microphone)]
    browser = playwright.chromium.launch(executable_path=PROGRAM, args=arguments)
    try:
        yield browser
    finally:
        browser.close()


@contextmanager
def tab(browser: Browser, address: str, **options: Any) -> Iterator[Tab]:
    """A new tab with the page; its console must say no error."""
    context = browser.new_context(**options)
    opened = Tab(context.new_page())
    opened.page.on("console", opened.note)
    opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
    try:
        opened.page.goto(address)
        opened.page.wait_for_selector("#faces input", state="attached")
        yield opened
        assert opened.said == [], opened.said
    finally:
        context.close()


def picture_of(data_url: str) -> Array:
    """uint8 [H, W, 3]"""
    data = base64.b64decode(data_url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def sound_of(blocks: list[dict[str, Any]]) -> Array:
    """All sound by the number of its frame: float32 [640 frames] in [-1, 1]; 0 where no block came."""
    frames = max(block["first"] + len(block["sound"]) // 640 for block in blocks)
    sound = np.zeros(640 * frames, np.float32)
    for block in blocks:
        start = 640 * block["first"]
        sound[start : start + len(block["sound"])] = np.array(block["sound"], np.float32) / 32768
    return sound


def heard_late_s(frame: dict[str, Any], sound: Array) -> float | None:
    """How much later than its picture a frame's sound is heard, from the samples that were played; None for silence.

    The played samples are found in the sound of the blocks; that place less the output's delay is what is heard while
    the picture is shown, and the frame's own place is the begin of its 40 ms.
    """
    played = np.array(frame["played"], np.float32)
    if np.sqrt(np.mean(played**2)) < 0.02:
        return None
    around = 640 * frame["number"]
    first = max(0, around - 16_000)
    searched = sound[first : around + 16_000]
    windows = np.lib.stride_tricks.sliding_window_view(searched, len(played))
    place = int(np.argmin(np.square(windows - played).sum(1)))
    if np.abs(windows[place] - played).max() > 0.01:  # across the fade of an interruption, or frames left out
        return None
    heard = first + place + len(played) - frame["playedBeforeHeardS"] * 16_000
    return float((around - heard) / 16_000)
