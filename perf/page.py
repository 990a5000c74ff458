"""Measures the page of `live-avatar web` in a real browser: lip sync, latency, and how fast an interruption is.

`python -m perf.page --artifacts artifacts/tiny --report perf/results/page.json` starts the server, the page and
Debian's chromium, whose sound goes nowhere. Sync is measured in two ways: by the page itself, and from the samples that
were played while a frame was drawn. With `--screenshots docs` it measures nothing, and makes the documents' pictures.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from playwright.sync_api import Browser, ViewportSize, sync_playwright

from live_avatar.assets import PORTRAITS
from live_avatar.environment import environment
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar_client.web.options import WebOptions
from live_avatar_client.web.server import serve
from perf.browser import Tab, chromium, heard_late_s, sound_of, tab

TEXT = "This is a long sentence, which I say without any hurry, as there is enough time. " * 5
TEXT_S = 20.0
TURNS = 10
QUIET = 1e-3
START_S = 60.0
SHOWN_TEXT = "Hello there, my name is Robin. How are you today?"
SPEAKING_SIZE: ViewportSize = {"width": 1020, "height": 780}
STATE_SIZE: ViewportSize = {"width": 1040, "height": 720}
GAP = 10


@dataclass(frozen=True)
class Sync:
    """How much earlier or later a picture is seen than its sound is heard, in milliseconds, without the sign."""

    seconds: float
    frames: int
    by_samples_p95_ms: float
    by_samples_most_ms: float
    by_page_p95_ms: float
    by_page_most_ms: float
    fps: float


@dataclass(frozen=True)
class Turns:
    """Medians over several turns, in milliseconds."""

    text_to_picture_ms: float
    interrupt_to_silence_ms: float


def measure_sync(visitor: Tab, seconds: float) -> Sync:
    """Lets the avatar of a conversation speak, and measures each frame."""
    visitor.record()
    samples_ms: list[float] = []
    page_ms: list[float] = []
    started_s = time.monotonic()
    blocks: list[dict[str, Any]] = []
    while time.monotonic() < started_s + seconds:
        visitor.say(TEXT)
        visitor.page.wait_for_timeout(1000 * min(TEXT_S, max(1.0, started_s + seconds - time.monotonic())))
        record = visitor.recorded()
        # Frames may be drawn after the record before has got their blocks.
        blocks = [*blocks[-16:], *record["blocks"]]
        sound = sound_of(blocks)
        late_s = (heard_late_s(frame, sound) for frame in record["frames"])
        samples_ms += [1000 * abs(late) for late in late_s if late is not None]
        page_ms += [1000 * abs(frame["offsetS"]) for frame in record["frames"]]
    passed_s = time.monotonic() - started_s
    return Sync(
        seconds=passed_s,
        frames=len(samples_ms),
        by_samples_p95_ms=float(np.percentile(samples_ms, 95)),
        by_samples_most_ms=max(samples_ms),
        by_page_p95_ms=float(np.percentile(page_ms, 95)),
        by_page_most_ms=max(page_ms),
        fps=len(page_ms) / passed_s,
    )


def measure_turns(visitor: Tab, turns: int = TURNS) -> Turns:
    """Says texts and interrupts them."""
    latencies_ms, silences_ms = [], []
    for _ in range(turns):
        visitor.say(TEXT)
        visitor.await_state("speaking")
        visitor.page.wait_for_timeout(1000)
        latencies_ms.append(float(visitor.call("visit.times.latencyMs")))
        silences_ms.append(float(visitor.page.evaluate(SILENCE, QUIET)))
        visitor.await_state("ready")
    return Turns(float(np.median(latencies_ms)), float(np.median(silences_ms)))


# Presses Escape, and returns the milliseconds until nothing louder than `quiet` was played for 0.2 s.
SILENCE = """async (quiet) => {
  const { visit: { player } } = await import("/app.js");
  const analyser = new AnalyserNode(player.context, { fftSize: 128 });
  player.volume.connect(analyser);
  const played = new Float32Array(128);
  const start = performance.now();
  let loud = start;
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  while (performance.now() - loud < 200) {
    await new Promise((resolve) => setTimeout(resolve, 4));
    analyser.getFloatTimeDomainData(played);
    if (played.some((sample) => Math.abs(sample) > quiet)) loud = performance.now();
  }
  player.volume.disconnect(analyser);
  return loud - start;
}"""


@contextmanager
def page_of(options: WebOptions) -> Iterator[str]:
    """The address of a page, without its last slash, while it is served from a thread."""
    addresses: list[str] = []
    over, told = threading.Event(), threading.Event()

    def ready(address: str) -> None:
        addresses.append(address.rstrip("/"))
        told.set()

    def run() -> None:
        try:
            asyncio.run(serve(options, ready, over.is_set))
        finally:
            told.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        if not told.wait(START_S) or not addresses:
            raise RuntimeError("the page's server has not started")
        yield addresses[0]
    finally:
        over.set()
        thread.join()


def take_screenshots(server: TritonServer, browser: Browser, address: str, folder: Path) -> None:
    """Writes `page.png`, the page while the avatar speaks, and `page_states.png`, four of its states."""
    states: list[Image.Image] = []
    with tab(browser, address, viewport=SPEAKING_SIZE) as visitor:
        visitor.start()
        visitor.page.click("#measured summary")
        visitor.say(SHOWN_TEXT)
        visitor.await_state("speaking")
        visitor.page.wait_for_timeout(1_500)
        _reduced(_screenshot(visitor)).save(folder / "page.png", optimize=True)
    with tab(browser, address, viewport=STATE_SIZE) as visitor, tab(browser, address, viewport=STATE_SIZE) as other:
        states.append(_screenshot(visitor))
        visitor.page.click("#start")
        while visitor.page.get_attribute("body", "data-state") != "ready":  # the place before it becomes free
            visitor.await_state("ready", "full")
            if visitor.page.get_attribute("body", "data-state") == "full":
                visitor.page.wait_for_timeout(500)
                visitor.page.click("#start")
        states.append(_screenshot(visitor))
        other.page.click("#start")
        other.await_state("full")
        states.append(_screenshot(other))
        os.kill(server.process.pid, signal.SIGKILL)
        visitor.await_state("lost")
        states.append(_screenshot(visitor))
    width, height = (side // 2 for side in states[0].size)
    sheet = Image.new("RGB", (2 * width + GAP, 2 * height + GAP), "white")
    for place, state in enumerate(states):
        row, column = divmod(place, 2)
        sheet.paste(
            state.resize((width, height), Image.Resampling.LANCZOS), (column * (width + GAP), row * (height + GAP))
        )
    _reduced(sheet).save(folder / "page_states.png", optimize=True)


def _screenshot(visitor: Tab) -> Image.Image:
    return Image.open(io.BytesIO(visitor.page.screenshot())).convert("RGB")


def _reduced(picture: Image.Image) -> Image.Image:
    """With 256 colours, for a small file."""
    return picture.quantize(256)


@click.command()
@click.option("--artifacts", type=click.Path(path_type=Path), required=True)
@click.option("--minutes", type=float, default=10.0, show_default=True, help="How long sync is measured.")
@click.option("--report", type=click.Path(path_type=Path), help="JSON file to write.")
@click.option(
    "--screenshots", type=click.Path(path_type=Path, file_okay=False), help="Folder for pictures of the page."
)
def main(artifacts: Path, minutes: float, report: Path | None, screenshots: Path | None) -> None:
    """Measure the page in a browser on this machine, or take pictures of it."""
    options = ServerOptions(artifacts, max_sessions=1).on_free_ports()
    with (
        serving(options) as server,
        page_of(WebOptions(options.url, port=0, portraits=PORTRAITS)) as address,
        sync_playwright() as playwright,
        chromium(playwright) as browser,
    ):
        if screenshots is not None:
            take_screenshots(server, browser, address, screenshots)
            print(f"Wrote {screenshots / 'page.png'} and {screenshots / 'page_states.png'}.")
            return
        document = measure(browser, address, minutes)
    if report is not None:
        report.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def measure(browser: Browser, address: str, minutes: float) -> dict[str, Any]:
    """The figures of a conversation in a tab of its own."""
    with tab(browser, address) as visitor:
        visitor.start()
        turns = measure_turns(visitor)
        sync = measure_sync(visitor, 60 * minutes)
        figures = visitor.call("{ ...visit.player.figures(performance.now()), firstFrameMs: visit.times.firstFrameMs }")
    return {
        "command": f"python -m perf.page --artifacts ARTIFACTS --minutes {minutes:g}",
        "environment": environment(),
        "load_average_15_min": os.getloadavg()[2],
        "browser": browser.version,
        "first_frame_ms": figures["firstFrameMs"],
        "sync": asdict(sync),
        "turns": asdict(turns),
        "late_blocks": figures["late"],
        "frames_not_drawn": figures["undrawn"],
        "frames_of_silence_left_out": figures["skipped"],
    }


if __name__ == "__main__":
    main()
