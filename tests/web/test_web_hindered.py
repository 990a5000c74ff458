"""The page in a real browser when it is recorded, hidden, lost, or behind a proxy that buffers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
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
from perf.browser import PROGRAM, sound_of, tab
from perf.page import measure_sync, page_of
from tests.cli.support import invoke
from tests.web.background import background_tab
from tests.web.support import PATIENCE_S, film, save, talking
from training.mouth import best_lag, correlation, measure_mouth

NGINX = shutil.which("nginx")
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="needs chromium (Debian: apt-get install chromium)")
pytestmark = [pytest.mark.slow]

MOST_OFFSET_MS = 45
LONG_TEXT = "This is a long sentence, which I say without any hurry, as there is enough time. " * 8
HELD_S = 0.5


def loudness(sound: Array, frames: int) -> Array:
    """Root mean square of each frame's 40 ms."""
    return np.sqrt(np.mean(np.square(sound[: 640 * frames].reshape(frames, 640)), axis=1))


# ---- Recording


@needs_browser
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
        path = download.value.path()
        name = download.value.suggested_filename
        visitor.page.wait_for_selector(f"#recorded:text-is('Saved {name}.')")
        assert visitor.page.get_attribute("#record", "aria-pressed") == "false"
        assert visitor.page.inner_text("#record") == "Record R"
        shown = sound_of(visitor.recorded()["blocks"])
        visitor.await_state("speaking")  # the conversation goes on
    assert name.startswith("avatar-")
    made = film(path.read_bytes())
    count = len(made.frames)
    assert count > 150
    assert made.times_s == pytest.approx([frame / 25 for frame in range(count)])
    # The sound is that of the blocks, and the mouth opens with it.
    heard, sent = loudness(made.sound, count), loudness(shown, len(shown) // 640)
    places = [np.abs(sent[at : at + count] - heard).mean() for at in range(len(sent) - count + 1)]
    assert min(places) < 0.01
    opening = measure_mouth(made.frames, portrait)[:, 0]
    smooth = np.convolve(heard, np.ones(3) / 3, "same")
    assert correlation(opening, smooth) > 0.5
    assert abs(best_lag(opening, smooth, range(-6, 7))) <= 1, "a frame is 40 ms"
    result = invoke("verify", path, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1, "nothing is signed here"
    assert found["claims"]["generator"] == "Live Avatar on Triton"
    assert len(found["claims"]["session_number"]) == 12
    assert found["aigc_label"]


@needs_browser
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
            assert len(film(download.value.path().read_bytes()).frames) > 25
        with serving(options):
            visitor.await_state("ready")
            visitor.page.click("#record")
            visitor.page.wait_for_selector("#record[aria-pressed=true]")
            visitor.page.wait_for_timeout(3_000)
            with visitor.page.expect_download() as download:
                visitor.page.click("#stop")
            name = download.value.suggested_filename
            visitor.page.wait_for_selector(f"#recorded:text-is('The conversation has ended. Saved {name}.')")
            assert len(film(download.value.path().read_bytes()).frames) > 25


# ---- In the background


@needs_browser
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


@needs_browser
def test_a_tab_that_was_frozen_goes_on_in_sync(page: str, tmp_path: Path):
    """The browser freezes tabs to save power: no code runs, and messages wait."""
    with background_tab(page, tmp_path) as visitor:
        visitor.value("document.getElementById('start').click()")
        visitor.wait("document.body.dataset.state === 'ready'")
        visitor.call("Page.setWebLifecycleState", state="frozen")
        time.sleep(6)
        visitor.call("Page.setWebLifecycleState", state="active")
        visitor.wait("document.body.dataset.state === 'ready'")
        visitor.value("visit.player.offsets = []")
        visitor.wait("visit.player.offsets.length >= 100")
        figures = visitor.value("visit.player.figures(performance.now())")
        assert figures["syncP95Ms"] < MOST_OFFSET_MS
        assert figures["bufferMs"] < 3_000, "silence that waited is left out"


# ---- Behind a proxy that buffers


@contextmanager
def holding(port: int) -> Iterator[int]:
    """The port of a proxy that collects what comes from a server for half a second before it passes it on."""
    loop = asyncio.new_event_loop()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, held_s: float) -> None:
        try:
            while data := await reader.read(1 << 20):
                await asyncio.sleep(held_s)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        await asyncio.gather(pass_on(reader, to_writer, 0), pass_on(to_reader, writer, HELD_S))

    proxy = loop.run_until_complete(asyncio.start_server(connected, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield proxy.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@needs_browser
def test_behind_a_proxy_that_buffers_the_buffer_adapts_and_the_page_says_so(browser: Browser, page: str):
    with holding(int(page.rpartition(":")[2])) as port, tab(browser, f"http://127.0.0.1:{port}") as visitor:
        visitor.start()
        measured = measure_sync(visitor, 20)
        before = visitor.call("visit.player.figures(performance.now())")
        visitor.page.wait_for_timeout(10_000)
        after = visitor.call("visit.player.figures(performance.now())")
        shown = visitor.page.inner_text("#uneven")
    assert measured.by_page_p95_ms < MOST_OFFSET_MS
    assert measured.by_samples_p95_ms < MOST_OFFSET_MS
    assert before["targetMs"] >= 300, "blocks come half a second apart and together"
    assert after["bufferMs"] < 3_000, "the delay does not run away"
    assert shown == "The connection brings the video in bursts, so it is shown up to a second later."


@pytest.mark.skipif(NGINX is None, reason="needs nginx (Debian: apt-get install nginx-light)")
def test_nginx_that_buffers_passes_a_conversation_and_a_recording(page: str, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "nginx.conf").write_text(
        f"""daemon off; worker_processes 1; pid {tmp_path}/pid; error_log stderr;
        events {{ }}
        http {{
          access_log off; proxy_buffering on; proxy_temp_path {tmp_path}/temp; client_body_temp_path {tmp_path}/body;
          fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u; scgi_temp_path {tmp_path}/s;
          server {{
            listen 127.0.0.1:{port};
            location / {{
              proxy_pass {page}; proxy_http_version 1.1; proxy_set_header Host $http_host;
              proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;
            }}
          }}
        }}"""
    )
    nginx = subprocess.Popen([str(NGINX), "-c", tmp_path / "nginx.conf", "-p", tmp_path], stderr=subprocess.DEVNULL)
    proxied = f"http://127.0.0.1:{port}"

    async def visit() -> tuple[list[float], int, bytes]:
        async with talking(proxied) as talker:
            await talker.send(type="record.start")
            path, times_s = "", []
            while len(times_s) < 12:
                message = await talker.receive()
                if isinstance(message, dict):
                    path = message["path"]
                else:
                    times_s.append(time.monotonic())
            return times_s, *await asyncio.to_thread(save, proxied, path)

    try:
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            with socket.socket() as trial:
                if not trial.connect_ex(("127.0.0.1", port)):
                    break
            assert time.monotonic() < deadline_s, "nginx has not started"
            time.sleep(0.1)
        times_s, status, file = asyncio.run(visit())
    finally:
        nginx.terminate()
        nginx.wait()
    assert times_s[-1] - times_s[0] > 2, "blocks come one by one"
    assert status == 200
    assert len(film(file).frames) >= 60
