"""The page in a real browser when it is recorded, hidden, lost, or behind a proxy that buffers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser

from live_avatar.arrays import Array
from live_avatar.assets import PORTRAITS
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.server import serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar_client.web.options import WebOptions
from perf.browser import PROGRAM, tab
from perf.page import measure_sync, page_of
from tests.cli.support import invoke
from tests.web.background import background_tab
from tests.web.support import PATIENCE_S, film
from training.mouth import best_lag, correlation, measure_mouth

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="needs chromium (Debian: apt-get install chromium)"),
]

MOST_OFFSET_MS = 45
LONG_TEXT = "This is a long sentence, which I say without any hurry, as there is enough time. " * 8
HELD_S = 0.5


def loudness(sound: Array, frames: int) -> Array:
    """Root mean square of each frame's 40 ms."""
    return np.sqrt(np.mean(np.square(sound[: 640 * frames].reshape(frames, 640)), axis=1))


# ---- Recording


def test_what_is_shown_is_saved_as_a_video_with_its_sound(browser: Browser, page: str, portrait: Array, tmp_path: Path):
    with tab(browser, page) as visitor:
        visitor.page.evaluate("document.getElementById('label').checked = false")
        visitor.start()
        visitor.record()
        visitor.page.click("#record")
        visitor.page.wait_for_selector("#record[aria-pressed=true]")
        assert visitor.page.inner_text("#recorded") == "Recording what the avatar says and shows."
        visitor.say(LONG_TEXT)
        visitor.await_state("speaking")
        visitor.page.wait_for_timeout(3_000)
        visitor.page.keyboard.press("Escape")  # an interruption
        visitor.await_state("ready")
        visitor.say(LONG_TEXT)
        visitor.await_state("speaking")
        visitor.page.wait_for_timeout(3_000)
        visitor.page.focus("#mute")
        with visitor.page.expect_download() as download:
            visitor.page.keyboard.press("r")
        file = download.value.path().read_bytes()
        name = download.value.suggested_filename
        visitor.page.wait_for_selector(f"#recorded:text-is('Saved {name}.')")
        assert visitor.page.get_attribute("#record", "aria-pressed") == "false"
        assert visitor.page.inner_text("#record") == "Record R"
        blocks = visitor.recorded()["blocks"]
        visitor.await_state("speaking")  # the conversation goes on
    assert name.startswith("avatar-")
    made = film(file)
    count = len(made.frames)
    assert count > 150
    assert made.times_s == pytest.approx([frame / 25 for frame in range(count)])
    # The sound is that of the blocks, one behind the other, and the mouth opens with it.
    shown = np.concatenate([block["sound"] for block in blocks]) / np.float32(32768)
    heard, sent = loudness(made.sound, count), loudness(shown, len(shown) // 640)
    places = [np.abs(sent[at : at + count] - heard).mean() for at in range(len(sent) - count + 1)]
    assert min(places) < 0.01
    opening = measure_mouth(made.frames, portrait)[:, 0]
    smooth = np.convolve(heard, np.ones(3) / 3, "same")
    assert correlation(opening, smooth) > 0.5
    assert abs(best_lag(opening, smooth, range(-6, 7))) <= 1, "a frame is 40 ms"
    (tmp_path / name).write_bytes(file)
    result = invoke("verify", tmp_path / name, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1, "nothing is signed here"
    assert found["claims"]["generator"] == "Live Avatar on Triton"
    assert len(found["claims"]["session_number"]) == 12
    assert found["aigc_label"]


def test_a_conversation_that_is_lost_or_ended_saves_its_recording(browser: Browser, artifacts: Artifacts):
    options = ServerOptions(artifacts.folder, share_avatars=True).on_free_ports()
    with page_of(WebOptions(options.url, port=0, portraits=PORTRAITS)) as page, tab(browser, page) as visitor:
        with serving(options) as server:
            visitor.start()
            visitor.page.click("#record")
            visitor.page.wait_for_selector("#record[aria-pressed=true]")
            visitor.page.wait_for_timeout(3_000)
            with visitor.page.expect_download() as download:
                os.kill(server.process.pid, signal.SIGKILL)
            name = download.value.suggested_filename
            visitor.page.wait_for_selector(f"#recorded:text-is('The conversation was lost. Saved {name}.')")
            assert len(film(download.value.path().read_bytes()).frames) >= 12
        with serving(options):
            visitor.await_state("ready")
            visitor.page.click("#record")
            visitor.page.wait_for_selector("#record[aria-pressed=true]")
            visitor.page.wait_for_timeout(3_000)
            with visitor.page.expect_download() as download:
                visitor.page.click("#stop")
            name = download.value.suggested_filename
            visitor.page.wait_for_selector(f"#recorded:text-is('The conversation has ended. Saved {name}.')")
            assert len(film(download.value.path().read_bytes()).frames) >= 12


# ---- In the background


def test_a_tab_in_the_background_speaks_on_and_is_in_sync_when_it_is_shown(page: str, tmp_path: Path):
    with background_tab(page, tmp_path) as visitor:
        visitor.value("document.getElementById('start').click()")
        visitor.wait("document.body.dataset.state === 'ready'")
        visitor.hide()
        visitor.value(f"document.getElementById('text').value = {json.dumps(LONG_TEXT)}")
        visitor.value("document.getElementById('say').click()")
        visitor.wait("document.body.dataset.state === 'speaking'")
        visitor.wait("visit.player.isSpeaking")
        drawn = visitor.value("visit.player.drawn")
        begun_s = visitor.value("visit.player.context.currentTime")
        time.sleep(15)
        assert visitor.value("visit.player.drawn") == drawn, "no picture is drawn in the background"
        assert visitor.value("visit.player.context.currentTime") - begun_s > 10, "the sound goes on"
        assert visitor.value("visit.player.isSpeaking")
        assert visitor.value("visit.player.frames.length") <= 250, "frames do not pile up"
        visitor.show()
        visitor.value("visit.player.offsets = []")
        visitor.wait("visit.player.offsets.length >= 60")
        figures = visitor.value("visit.player.figures(performance.now())")
        assert figures["syncP95Ms"] < MOST_OFFSET_MS
        assert figures["bufferMs"] < 3_000
        assert visitor.value("document.getElementById('notice').textContent") == ""


def test_a_tab_that_was_frozen_takes_the_conversation_up_again(page: str, tmp_path: Path):
    """The browser freezes hidden tabs to save power, and closes their connections."""
    with background_tab(page, tmp_path) as visitor:
        visitor.value("document.getElementById('start').click()")
        visitor.wait("document.body.dataset.state === 'ready'")
        visitor.hide()
        visitor.call("Page.setWebLifecycleState", state="frozen")
        time.sleep(3)
        visitor.call("Page.setWebLifecycleState", state="active")
        visitor.show()
        visitor.wait("document.body.dataset.state === 'ready'")
        visitor.value("visit.player.offsets = []")
        visitor.wait("visit.player.offsets.length >= 40")
        figures = visitor.value("visit.player.figures(performance.now())")
        assert figures["syncP95Ms"] < MOST_OFFSET_MS
        assert figures["bufferMs"] < 3_000


# ---- Behind a proxy that buffers


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, held_s: float) -> None:
    """Passes on what has come together in some time."""
    with contextlib.closing(writer), contextlib.suppress(OSError):  # closed too where the proxy ends before the page
        while data := await reader.read(1 << 20):
            await asyncio.sleep(held_s)
            writer.write(data)
            await writer.drain()


@contextmanager
def holding(port: int) -> Iterator[int]:
    """The port of a proxy that collects what comes from a server for half a second before it passes it on."""
    ports: queue.Queue[int] = queue.Queue()
    over = threading.Event()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        await asyncio.gather(pass_on(reader, to_writer, 0), pass_on(to_reader, writer, HELD_S))

    async def run() -> None:
        async with await asyncio.start_server(connected, "127.0.0.1", 0) as proxy:
            ports.put(proxy.sockets[0].getsockname()[1])
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(run(),))  # playwright has the loop of this thread
    thread.start()
    try:
        yield ports.get(timeout=PATIENCE_S)
    finally:
        over.set()
        thread.join()


def test_behind_a_proxy_that_buffers_sound_and_picture_stay_together(browser: Browser, page: str):
    with holding(int(page.rpartition(":")[2])) as port, tab(browser, f"http://127.0.0.1:{port}") as visitor:
        visitor.start()
        measured = measure_sync(visitor, 20)
        figures = visitor.call("visit.player.figures(performance.now())")
        visitor.call("visit.player.timeline.targetS = 0.5")  # as after a block that was half a second late
        shown = "The video comes in bursts or too slowly, so it is shown up to a second later."
        visitor.page.wait_for_selector(f"#uneven:text-is('{shown}')")
    assert measured.by_page_p95_ms < MOST_OFFSET_MS
    assert measured.by_samples_p95_ms < MOST_OFFSET_MS
    assert figures["bufferMs"] < 3_000, "the delay does not run away"


@pytest.mark.parametrize("held_s", [0.5, 1.0, 1.3])
def test_the_buffer_bears_bursts_after_few_late_blocks(browser: Browser, page: str, held_s: float):
    code = """async (heldS) => {
      const { Timeline } = await import("/timeline.js");
      const timeline = new Timeline();
      let most = 0;
      for (let i = 0; i < 1500; i += 1) {
        const block = Math.floor(i / 3);
        timeline.place(4, Math.ceil((block * 0.48) / heldS) * heldS, block % 50 > 40);
        if (i % 3 === 0) most = Math.max(most, timeline.leadS);
      }
      return { late: timeline.late, most };
    }"""
    with tab(browser, page) as visitor:
        bursts = visitor.page.evaluate(code, held_s)
    assert bursts["late"] <= 3
    assert bursts["most"] < held_s + 0.6


def test_a_block_that_is_late_by_much_raises_the_buffer_at_once(browser: Browser, page: str):
    code = """async () => {
      const { Timeline } = await import("/timeline.js");
      const timeline = new Timeline();
      const block = (nowS) => [1, 2, 3].forEach(() => timeline.place(4, nowS, false));
      [0, 0.48, 1.6].forEach(block);
      const raised = timeline.targetS;
      for (let i = 1; i <= 60; i += 1) block(1.6 + 0.48 * i);
      return { late: timeline.late, raised, lowered: timeline.targetS };
    }"""
    with tab(browser, page) as visitor:
        buffer = visitor.page.evaluate(code)
    assert buffer["late"] == 1
    assert buffer["raised"] == pytest.approx(0.08 + 1.6 - 1.04)
    assert buffer["lowered"] < buffer["raised"] - 0.25, "half of what no block needed"
