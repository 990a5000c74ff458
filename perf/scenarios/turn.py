"""Turns of a conversation: somebody speaks while the avatar idles, and waits for the first frame that shows it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from live_avatar.arrays import Array
from live_avatar.assets import SPEECH
from live_avatar.cli.demo import spoken
from live_avatar.errors import ServerError
from live_avatar_client import AvatarSession
from live_avatar_client.media import read_speech
from live_avatar_client.protocol import FRAMES_PER_LATENT, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from perf.figures import BUFFER_S, FRAME_S
from perf.load import Speaker
from perf.report import lines_picture
from perf.scenario import Context, Figures, Scenario

TURNS, QUICK_TURNS = 200, 3
SPEECH_S = 1.0
IDLE_S = (1.5, 2.5)
"""Between turns, drawn anew each time: a turn begins anywhere in a block of silence."""
LOUD = 1000
GAP_SAMPLES = SAMPLE_RATE_HZ // 2
"""So many zeros separate two turns; the idle client sends zeros between them, and the speech has no such pause."""


@dataclass(frozen=True, eq=False)
class Heard:
    """What counts of one block: its number of frames, when they arrived, and the audio [samples] that they show."""

    frames: int
    received_s: float
    audio: Array


@dataclass(frozen=True)
class Turn:
    """Times from the first sample of speech.

    received_s: until its frame is at the client; shown_s: until a player shows that frame, which plays every frame
    for 0.04 s and started `BUFFER_S` after the first one.
    """

    received_s: float
    shown_s: float


@dataclass(frozen=True)
class Turns:
    found: list[Turn]
    stalled_s: list[float]
    """By stall of the player: how long it waited for the next frame."""


def measure(context: Context) -> Figures:
    count = QUICK_TURNS if context.quick else TURNS
    with context.server() as target, tempfile.TemporaryDirectory() as scratch:
        speaker = Speaker(target, Path(scratch))
        speaker.warm_up()
        generator = np.random.default_rng(context.seed)
        speech = _from_its_onset(read_speech(SPEECH))
        ways = {
            "spoken": _converse(speaker, count, generator, lambda: spoken(speech)),
            "at_once": _converse(speaker, count, generator, lambda: [speech]),
        }
    lines_picture(
        context.picture("turn"),
        "From the first sample of speech to the frame that shows it",
        "turn",
        "ms",
        {
            f"{way}, {what}": (
                list(map(float, range(len(of.found)))),
                [1e3 * getattr(t, f"{what}_s") for t in of.found],
            )
            for way, of in ways.items()
            for what in ("received", "shown")
        },
    )
    return {
        "turns": count,
        **{way: _summary(of) for way, of in ways.items()},
    }


def turns(blocks: Sequence[Heard], begun_s: Sequence[float]) -> Turns:
    """The turns in the blocks of one session. `begun_s`: when the first sample of each was spoken, in order.

    The audio of the blocks is zero between turns, and the first sample of a turn is not. Raises `ServerError` if the
    blocks have more or fewer turns.
    """
    found: list[tuple[float, float]] = []
    stalled_s: list[float] = []
    free_s, zeros = blocks[0].received_s + BUFFER_S, GAP_SAMPLES
    for block in blocks:
        if block.received_s > free_s:
            stalled_s.append(block.received_s - free_s)
        shown_s = max(free_s, block.received_s)
        free_s = shown_s + block.frames * FRAME_S
        heard = [int(sample) for sample in np.flatnonzero(block.audio)]
        if heard and zeros + heard[0] >= GAP_SAMPLES:
            found.append((block.received_s, shown_s + heard[0] // SAMPLES_PER_FRAME * FRAME_S))
        zeros = len(block.audio) - 1 - heard[-1] if heard else zeros + len(block.audio)
    if len(found) != len(begun_s):
        raise ServerError(
            f"{len(begun_s)} turns were spoken, and the frames show {len(found)}; the server lost or cut speech: read "
            "its log."
        )
    each = zip(found, begun_s, strict=True)
    return Turns([Turn(received - start, shown - start) for (received, shown), start in each], stalled_s)


def _converse(
    speaker: Speaker, count: int, generator: np.random.Generator, say: Callable[[], Iterable[Array]]
) -> Turns:
    """One session that idles, in which `say()` gives the chunks of one turn, so often."""
    begun_s: list[float] = []
    with speaker.session(idle=True, frames_per_response=FRAMES_PER_LATENT) as session, ThreadPoolExecutor(1) as pool:
        blocks = pool.submit(_read, session)
        for _ in range(count):
            time.sleep(generator.uniform(*IDLE_S))
            begun_s.append(time.monotonic())
            for chunk in say():
                session.send(chunk)
            time.sleep(max(0.0, begun_s[-1] + SPEECH_S - time.monotonic()))  # until it is played
        time.sleep(IDLE_S[0])
        session.end()
        return turns(blocks.result(), begun_s)


def _read(session: AvatarSession) -> list[Heard]:
    return [Heard(len(block), block.received_at_s, block.audio) for block in session]


def _from_its_onset(speech: Array) -> Array:
    start = int(np.flatnonzero(np.abs(speech.astype(np.int32)) > LOUD)[0])
    return speech[start : start + round(SPEECH_S * SAMPLE_RATE_HZ)]


def _summary(of: Turns) -> Figures:
    return {
        "received": _percentiles(turn.received_s for turn in of.found),
        "shown": _percentiles(turn.shown_s for turn in of.found),
        "stalls": len(of.stalled_s),
        "stalled_s": sum(of.stalled_s),
        "longest_stall_s": max(of.stalled_s, default=0.0),
    }


def _percentiles(times_s: Iterable[float]) -> Figures:
    p50, p95, longest = (float(p) for p in np.percentile(list(times_s), (50, 95, 100)))
    return {"p50_s": p50, "p95_s": p95, "longest_s": longest}


ABOUT = f"{TURNS} turns of speech as it is spoken, and {TURNS} at once, while the avatar idles"
SCENARIO = Scenario("turn", ABOUT, measure)
