"""The page in a real browser, whose microphone hears a file, in front of the real server."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Playwright

from live_avatar.arrays import Array
from live_avatar.assets import PORTRAITS
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.server import serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar_client.media import read_speech
from live_avatar_client.web.options import WebOptions
from perf.browser import PROGRAM, chromium, heard_late_s, picture_of, sound_of, tab
from perf.page import measure_sync, page_of
from tests.cli.support import tone, write_audio
from training.mouth import best_lag, correlation, measure_mouth

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="needs chromium (Debian: apt-get install chromium)"),
]

MOST_OFFSET_S = 0.045
SYNC_S = 60
PATIENCE_S = 120.0
LONG_TEXT = "This is a long sentence, which I say without any hurry, as there is enough time. " * 8
SHORT_TEXT = "Now something else."


def test_the_mouth_opens_with_the_voice_of_the_microphone(browser: Browser, page: str, portrait: Array):
    with tab(browser, page) as visitor:
        visitor.page.evaluate("document.getElementById('label').checked = false")
        visitor.start()
        visitor.record(pictures=True)
        visitor.page.click("#microphone")
        visitor.await_state("speaking")
        blocks: list[dict] = []
        frames: list[dict] = []
        deadline_s = time.monotonic() + PATIENCE_S
        while sum(frame["isSpeech"] for frame in frames) < 120:
            assert time.monotonic() < deadline_s
            visitor.page.wait_for_timeout(1_000)
            record = visitor.recorded()
            blocks += record["blocks"]
            frames += record["frames"]
        visitor.page.click("#microphone")
    sound = sound_of(blocks)
    opening = measure_mouth(np.stack([picture_of(frame["picture"]) for frame in frames]), portrait)[:, 0]
    loudness = np.array([np.sqrt(np.mean(sound[640 * frame["number"] :][:640] ** 2)) for frame in frames])
    smooth = np.convolve(loudness, np.ones(3) / 3, "same")
    assert opening[loudness > 0.05].mean() > opening[loudness == 0].mean() + 0.15
    assert correlation(opening, smooth) > 0.5
    assert abs(best_lag(opening, smooth, range(-6, 7))) <= 2
    late_s = [late for frame in frames if (late := heard_late_s(frame, sound)) is not None]
    assert len(late_s) > 20
    assert np.percentile(np.abs(late_s), 95) < MOST_OFFSET_S


def test_sound_and_picture_stay_together(browser: Browser, page: str):
    with tab(browser, page) as visitor:
        visitor.start()
        measured = measure_sync(visitor, SYNC_S)
    assert measured.frames > 2 * SYNC_S  # on a machine that is busy
    assert measured.by_samples_p95_ms < 1000 * MOST_OFFSET_S
    assert measured.by_page_p95_ms < 1000 * MOST_OFFSET_S


def test_an_interrupt_ends_the_sound_at_once_and_something_else_can_be_said(browser: Browser, page: str):
    with tab(browser, page) as visitor:
        visitor.start()
        visitor.record()
        visitor.say(LONG_TEXT)
        visitor.await_state("speaking")
        visitor.page.wait_for_timeout(1_000)
        visitor.page.keyboard.press("Escape")
        visitor.await_state("ready")
        visitor.recorded()
        visitor.page.wait_for_timeout(2_000)
        after = visitor.recorded()
        assert all(not any(block["sound"]) for block in after["blocks"] if block["turn"] == 1)
        assert len([block for block in after["blocks"] if block["turn"] == 0]) <= 2
        played = after["frames"][-25:]
        assert np.abs([frame["played"] for frame in played]).max() < 1e-4
        visitor.say(SHORT_TEXT)
        visitor.await_state("speaking")
        visitor.await_state("ready")


def test_a_voice_at_the_microphone_interrupts_the_avatar(browser: Browser, page: str):
    with tab(browser, page) as visitor:
        visitor.start()
        visitor.say(LONG_TEXT)
        visitor.await_state("speaking")
        visitor.page.click("#microphone")
        deadline_s = time.monotonic() + 30
        while visitor.call("visit.source") != "microphone":
            assert time.monotonic() < deadline_s
            visitor.page.wait_for_timeout(50)
        assert visitor.call("visit.connection.turn") == 1
        visitor.await_state("speaking")


def test_two_tabs_talk_and_the_third_is_told_that_it_is_full(browser: Browser, page: str):
    with tab(browser, page) as first, tab(browser, page) as second, tab(browser, page) as third:
        first.start()
        second.start()
        third.page.click("#start")
        third.await_state("full")
        assert "session" in third.notice()
        assert third.page.inner_text("#state") == "Full: all places are taken"
        second.page.close()
        deadline_s = time.monotonic() + 30
        while third.page.get_attribute("body", "data-state") != "ready":
            assert time.monotonic() < deadline_s
            if third.page.get_attribute("body", "data-state") == "full":
                third.page.click("#start")
            third.page.wait_for_timeout(200)
        first.say(SHORT_TEXT)
        first.await_state("speaking")


def test_a_server_that_is_killed_and_comes_back_is_found_again(browser: Browser, artifacts: Artifacts):
    options = ServerOptions(artifacts.folder, share_avatars=True).on_free_ports()
    with page_of(WebOptions(options.url, port=0, portraits=PORTRAITS)) as page, tab(browser, page) as visitor:
        with serving(options) as server:
            visitor.page.evaluate("document.querySelector('input[value=Omar]').click()")
            visitor.start()
            os.kill(server.process.pid, signal.SIGKILL)
            visitor.await_state("lost")
            assert "Connecting again in" in visitor.notice()
        with serving(options):
            visitor.await_state("ready")
            assert visitor.call("visit.connection.settings.fields.portrait") == "Omar"
            visitor.say(SHORT_TEXT)
            visitor.await_state("speaking")
            assert visitor.notice() == ""


def test_sound_files_of_any_rate_are_said(browser: Browser, page: str, tmp_path: Path):
    with tab(browser, page) as visitor:
        visitor.start()
        visitor.record()
        for rate_hz in (44_100, 96_000):
            file = write_audio(tmp_path / f"{rate_hz}.wav", tone(1.5, rate_hz), "pcm_s16le", rate_hz, "stereo")
            visitor.page.set_input_files("#sound", file)
            visitor.await_state("speaking")
            visitor.await_state("ready")
        (tmp_path / "x.wav").write_bytes(b"RIFF" + bytes(100))
        visitor.page.set_input_files("#sound", tmp_path / "x.wav")
        visitor.page.wait_for_selector("#notice:not([hidden])")
        assert "The browser cannot read this sound file. Choose a WAV" in visitor.notice()
        blocks = visitor.recorded()["blocks"]
    sound = sound_of(blocks)
    spoken = np.flatnonzero(np.abs(sound) > 0.1)
    assert len(spoken) > 16_000
    spectrum = np.abs(np.fft.rfft(sound))
    assert np.argmax(spectrum) * 16_000 / len(sound) == pytest.approx(300, abs=5)


def test_an_own_picture_of_30_megabytes_is_scaled_down_and_a_broken_one_is_refused(
    browser: Browser, page: str, tmp_path: Path
):
    noise = np.random.default_rng(1).integers(0, 256, (2_900, 3_600, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png", compress_level=0)
    assert (tmp_path / "large.png").stat().st_size > 30_000_000
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with tab(browser, page) as visitor:
        visitor.page.set_input_files("#picture", tmp_path / "broken.png")
        visitor.page.wait_for_selector("#notice:not([hidden])")
        assert "The browser cannot read this picture. Choose a PNG, JPEG or WebP file." in visitor.notice()
        visitor.page.set_input_files("#picture", tmp_path / "large.png")
        visitor.page.wait_for_selector("#faces img[src^=blob]", state="attached", timeout=60_000)
        visitor.start()


def test_without_a_permission_the_page_says_what_to_do(playwright: Playwright, page: str):
    with chromium(playwright) as strict, tab(strict, page) as visitor:
        visitor.start()
        visitor.page.click("#microphone")
        visitor.page.wait_for_selector("#notice:not([hidden])")
        assert visitor.notice().endswith("or type a text.")
        visitor.say(SHORT_TEXT)
        visitor.await_state("speaking")


def test_without_a_microphone_the_page_says_what_to_do(browser: Browser, page: str):
    refuse = """(name) => {
      navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException("Requested device not found", name));
    }"""
    with tab(browser, page) as visitor:
        visitor.start()
        for name, sentence in (
            ("NotFoundError", "No microphone was found. Plug one in, or type a text."),
            ("NotReadableError", "The microphone is in use by another program. Close that program, or type a text."),
            ("AbortError", "The microphone cannot be used: Requested device not found. Type a text instead."),
        ):
            visitor.page.evaluate(refuse, name)
            visitor.page.click("#microphone")
            visitor.page.wait_for_selector(f"#notice:text-is('{sentence}')")
            assert visitor.page.get_attribute("#microphone", "aria-pressed") == "false"
        visitor.say(SHORT_TEXT)
        visitor.await_state("speaking")


@pytest.mark.parametrize("rate_hz", [44_100, 96_000])
def test_microphones_of_other_rates_are_heard_at_their_pitch(browser: Browser, page: str, heard: Path, rate_hz: int):
    """The file's speech at 16 kHz is found in what the server got."""
    code = """(sampleRate) => {
      const Real = AudioContext;
      globalThis.AudioContext = class extends Real { constructor(options) { super(options ?? { sampleRate }); } };
    }"""
    with tab(browser, page) as visitor:
        visitor.start()
        visitor.record()
        visitor.page.evaluate(code, rate_hz)
        visitor.page.click("#microphone")
        visitor.await_state("speaking")
        assert visitor.call("visit.microphone.context.sampleRate") == rate_hz
        visitor.page.wait_for_timeout(6_000)
        said = sound_of(visitor.recorded()["blocks"])
    speech = read_speech(heard) / 32768
    size = 1 << int(np.ceil(np.log2(len(said) + 2 * len(speech))))
    alike = np.fft.irfft(np.fft.rfft(said, size) * np.fft.rfft(np.tile(speech, 2), size).conj(), size)
    assert np.abs(alike).max() / np.sqrt(np.sum(said**2) * np.sum(speech**2)) > 0.3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_narrow_screen_and_is_read_by_keyboard(browser: Browser, page: str, scheme: str):
    with tab(browser, page, viewport={"width": 360, "height": 740}, color_scheme=scheme) as visitor:
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 360
        back = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, back[4:-1].split(","))) < 200) == (scheme == "dark")
        visitor.page.keyboard.press("Tab")
        assert visitor.page.evaluate("document.activeElement.id") == "start"
        visitor.page.keyboard.press("Enter")
        visitor.await_state("ready")
        assert visitor.page.evaluate("document.activeElement.id") == "text"
        names = visitor.page.evaluate(
            "[...document.querySelectorAll('button, input, textarea')].filter((one) => !one.labels?.length"
            " && !one.textContent.trim() && !one.ariaLabel).map((one) => one.id)"
        )
        assert names == []
        assert visitor.page.get_attribute("#status", "role") == "status"


def test_the_microphones_resampler_keeps_tones_and_removes_what_is_too_high(browser: Browser, page: str):
    code = """async ([rateHz, toneHz]) => {
      const { Resampler } = await import("/resampler.js");
      const resampler = new Resampler(rateHz, 16000);
      const made = [];
      for (let at = 0; at < rateHz; at += 128) {
        const place = (i) => (2 * Math.PI * toneHz * (at + i)) / rateHz;
        const chunk = Float32Array.from({ length: 128 }, (_, i) => Math.sin(place(i)));
        made.push(...resampler.add(chunk));
      }
      return made;
    }"""
    with tab(browser, page) as visitor:
        for rate_hz in (8_000, 44_100, 48_000, 96_000):
            made = np.array(visitor.page.evaluate(code, [rate_hz, 1_000]))
            assert 15_700 < len(made) < 16_200
            expected = np.sin(2 * np.pi * 1_000 * np.arange(len(made)) / 16_000)
            np.testing.assert_allclose(made[200:], expected[200:], atol=2e-3)
        assert np.abs(np.array(visitor.page.evaluate(code, [48_000, 10_000]))[200:]).max() < 2e-3


@pytest.mark.parametrize("drift", [-2e-4, 2e-4])
def test_the_buffer_neither_grows_nor_ends_in_a_night_of_drifting_clocks(browser: Browser, page: str, drift: float):
    code = """async (drift) => {
      const { Timeline } = await import("/timeline.js");
      const timeline = new Timeline();
      let most = 0;
      const blocks = Math.round((12 * 3600) / 0.48);
      for (let i = 0; i < blocks; i += 1) {
        const arrivesS = i * 0.48 * (1 + drift) + 0.02 * Math.sin(i);
        timeline.place(12, arrivesS, i % 50 > 40);
        most = Math.max(most, timeline.leadS);
      }
      return { most, late: timeline.late, skipped: timeline.skipped, blocks };
    }"""
    with tab(browser, page) as visitor:
        night = visitor.page.evaluate(code, drift)
    assert night["most"] < 1.2
    assert night["late"] < night["blocks"] / 500
    assert (night["skipped"] > 0) == (drift < 0)


def test_the_gate_opens_for_speech_and_not_for_noise(browser: Browser, page: str):
    code = """async ([before, loud, isHeard]) => {
      const { Gate } = await import("/gate.js");
      const gate = new Gate();
      let sent = 0;
      for (let i = 0; i < 100; i += 1) sent += gate.add([], before * (0.8 + 0.4 * (i % 2)), isHeard).length;
      const noise = sent;
      for (let i = 0; i < 25; i += 1) sent += gate.add([], loud, isHeard).length;
      const opened = gate.isOpen;
      for (let i = 0; i < 25; i += 1) gate.add([], before, isHeard);
      return { noise, speech: sent - noise, opened, closed: !gate.isOpen };
    }"""
    with tab(browser, page) as visitor:
        speech = visitor.page.evaluate(code, [0.004, 0.1, False])
        assert speech == {"noise": 0, "speech": speech["speech"], "opened": True, "closed": True}
        assert 25 + 4 <= speech["speech"] <= 25 + 7
        assert visitor.page.evaluate(code, [0.004, 0.015, True])["speech"] == 0
