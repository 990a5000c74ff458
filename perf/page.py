"""Measures the page of `live-avatar web` in a real browser: lip sync, latency, and how fast an interruption is.

`python -m perf.page --artifacts artifacts/tiny --report perf/results/page.json` starts the server, the page and
Debian's chromium, whose sound goes nowhere. Sync is measured in two ways: by the page itself, and from the samples that
were played while a frame was drawn.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from playwright.sync_api import sync_playwright

from live_avatar.assets import PORTRAITS
from live_avatar.environment import environment
from live_avatar.serving.server import serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar_client.web.options import WebOptions
from live_avatar_client.web.server import serve
from perf.browser import Tab, chromium, heard_late_s, sound_of, tab

TEXT = "This is a long sentence, which I say without any hurry, as there is enough time. " * 5
TEXT_S = 20.0
TURNS = 10
QUIET = 1e-3
START_S = 60.0


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


@click.command()
@click.option("--artifacts", type=click.Path(path_type=Path), required=True)
@click.option("--minutes", type=float, default=10.0, show_default=True, help="How long sync is measured.")
@click.option("--report", type=click.Path(path_type=Path), help="JSON file to write.")
def main(artifacts: Path, minutes: float, report: Path | None) -> None:
    """Measure the page in a browser on this machine."""
    options = ServerOptions(artifacts, max_sessions=1).on_free_ports()
    with (
        serving(options),
        page_of(WebOptions(options.url, port=0, portraits=PORTRAITS)) as address,
        sync_playwright() as playwright,
        chromium(playwright) as browser,
        tab(browser, address) as visitor,
    ):
        visitor.start()
        turns = measure_turns(visitor)
        sync = measure_sync(visitor, 60 * minutes)
        figures = visitor.call("{ ...visit.player.figures(performance.now()), firstFrameMs: visit.times.firstFrameMs }")
    document = {
        "command": f"python -m perf.page --artifacts ARTIFACTS --minutes {minutes:g}",
        "environment": environment(),
        "browser": browser.version,
        "first_frame_ms": figures["firstFrameMs"],
        "sync": asdict(sync),
        "turns": asdict(turns),
        "late_blocks": figures["late"],
        "frames_not_drawn": figures["undrawn"],
        "frames_of_silence_left_out": figures["skipped"],
    }
    if report is not None:
        report.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
