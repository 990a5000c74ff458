"""The sessions of the soak: what each client says and at what pace, and how its frames are checked.

Every frame is compared with the generator's. A pool has the frames of every utterance; frames of other speech are
generated when they are needed.
"""

from __future__ import annotations

import io
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from live_avatar.arrays import Array
from live_avatar.assets import PORTRAIT
from live_avatar.pipeline.generator import Generator
from live_avatar.serving.label import Label
from live_avatar_client import AvatarSession, Block
from live_avatar_client.pacing import BLOCK_S
from live_avatar_client.protocol import BLOCK_SAMPLES, FRAMES_PER_BLOCK, FrameFormat

AVATARS = 6
UTTERANCES_PER_AVATAR = 3
UTTERANCE_BLOCKS = 20
ANSWER_S = 300.0
"""A new avatar is encoded at the lowest priority: on a busy machine that took 30 s."""
AFTER_OUTAGE_S = 2.0
NOTHING = np.zeros(0, dtype=np.int16)
FULL = "sessions of this server are taken"
SHUTTING_DOWN = "shutting down"
HANGS = ("AnswerTimeout", "SendTimeout", "DEADLINE_EXCEEDED")


# ---- Speech and expected frames


@dataclass(frozen=True)
class Utterance:
    """An avatar's speech and its frames: int16 [blocks, samples] -> uint8 [frames, H, W, 3]."""

    image: bytes
    prompt: str
    seed: int
    speech: Array
    frames: Array

    def speech_of(self, blocks: int) -> Array:
        return self.speech[:blocks].reshape(-1)


@dataclass(frozen=True)
class FrameOptions:
    """The requested form of the frames; quality 0 means raw frames."""

    jpeg_quality: int = 0
    label: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Options of the client library."""
        chosen = {"frame_format": FrameFormat.JPEG, "jpeg_quality": self.jpeg_quality} if self.jpeg_quality else {}
        return {**chosen, "label": self.label}

    def of(self, frames: Array) -> list[bytes]:
        """The bytes that a client gets for each frame."""
        if self.label and len(frames):
            frames = Label(self.label, frames.shape[1], frames.shape[2]).draw(frames)
        return [_jpeg(frame, self.jpeg_quality) if self.jpeg_quality else frame.tobytes() for frame in frames]


FRAME_OPTIONS = (
    FrameOptions(),
    FrameOptions(),
    FrameOptions(),
    FrameOptions(label="AI-generated"),
    FrameOptions(90),
    FrameOptions(60, "AI"),
)


class Oracle:
    """Expected frames: from the pool for the beginning of an utterance, else generated on demand."""

    def __init__(self, generate: Callable[[Utterance, Array], Array]) -> None:
        self._generate = generate
        self._lock = threading.Lock()

    def frames(self, utterance: Utterance, heard: Array) -> Array:
        """Frames of int16 [samples], whole blocks, as the server got them."""
        if len(heard) % BLOCK_SAMPLES:
            raise ValueError(f"{len(heard)} samples are no whole blocks of {BLOCK_SAMPLES}; the last one is not known")
        blocks = heard.reshape(-1, BLOCK_SAMPLES)
        if len(blocks) <= len(utterance.speech) and np.array_equal(blocks, utterance.speech[: len(blocks)]):
            return utterance.frames[: len(blocks) * FRAMES_PER_BLOCK]
        with self._lock:
            return self._generate(utterance, blocks)


def generate(generator: Generator, utterance: Utterance, blocks: Array) -> Array:
    made = generator.stream(utterance.image, utterance.prompt, utterance.seed, iter(blocks))
    return np.concatenate([block.frames for block in made])


def make_utterances(generator: Generator, seed: int) -> Iterator[Utterance]:
    rng = np.random.default_rng(seed)
    for avatar, image in enumerate(pictures(AVATARS)):
        for _ in range(UTTERANCES_PER_AVATAR):
            loudness = rng.integers(300, 6000)
            speech = (rng.standard_normal((UTTERANCE_BLOCKS, BLOCK_SAMPLES)) * loudness).astype(np.int16)
            utterance = Utterance(image, f"person {avatar}, speaking", int(rng.integers(2**31)), speech, NOTHING)
            yield replace(utterance, frames=generate(generator, utterance, speech))


def pictures(count: int) -> list[bytes]:
    """The portrait in several tints."""
    grey = Image.open(PORTRAIT).convert("L")
    tints = [(255 - 20 * n, 160 + 15 * n, 130 + 20 * n) for n in range(count)]
    return [_encoded(ImageOps.colorize(grey, "black", tint), "PNG") for tint in tints]


def _jpeg(frame: Array, quality: int) -> bytes:
    return _encoded(Image.fromarray(frame), "JPEG", quality=quality)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- Results


class Ending(StrEnum):
    """How a session ends, or what its client does meanwhile."""

    COMPLETED = "completed"
    CLOSED = "closed early"
    INTERRUPTED = "interrupted"
    IDLE = "idle between words"
    CANCELLED = "call cancelled"
    KILLED = "client killed"
    SILENT = "silent"
    STARTED_TWICE = "started twice"
    UNKNOWN = "unknown id"
    OTHER_STREAM = "id on another stream"
    BAD_INPUT = "bad input"
    DRAINED = "live in the drain"


class Outcome(StrEnum):
    """What the client observed."""

    EXPECTED = "expected"
    FULL = "refused, full"
    LOST = "lost with a stage"
    HUNG = "no answer"
    SHUT_DOWN = "ended by the drain"
    UNEXPECTED = "unexpected"


class Results:
    """Counts of all sessions and frames; many threads add to them."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[Ending, Outcome]] = Counter()
        self.frames = 0
        self.wrong_frames = 0
        self.findings: list[str] = []
        self._lock = threading.Lock()

    def ended(self, ending: Ending, outcome: Outcome, why: str) -> None:
        with self._lock:
            self.outcomes[ending, outcome] += 1
            if outcome in (Outcome.UNEXPECTED, Outcome.HUNG):
                self.findings.append(f"{ending}: {why}")

    def compare(self, ending: Ending, first: int, got: Sequence[bytes], expected: Sequence[bytes]) -> None:
        """Compares frames from number `first` on with the expected ones; additional frames are wrong, too."""
        wrong = [first + n for n, frame in enumerate(got) if n >= len(expected) or frame != expected[n]]
        with self._lock:
            self.frames += len(got)
            self.wrong_frames += len(wrong)
            if wrong:
                self.findings.append(f"{ending}: frames {wrong[0]} to {wrong[-1]}, {len(wrong)} of them wrong")

    def count(self, outcome: Outcome) -> int:
        return sum(number for (_, seen), number in list(self.outcomes.items()) if seen is outcome)

    def table(self) -> dict[str, dict[str, int]]:
        rows: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for (ending, outcome), number in sorted(self.outcomes.items()):
            rows[ending.value][outcome.value] = number
        return dict(rows)


# ---- Clients

WEIGHTS: dict[Ending, float] = {
    Ending.COMPLETED: 10,
    Ending.CLOSED: 3,
    Ending.INTERRUPTED: 2,
    Ending.IDLE: 1,
    Ending.CANCELLED: 2,
    Ending.KILLED: 0.5,
    Ending.SILENT: 1.5,
    Ending.STARTED_TWICE: 1.5,
    Ending.UNKNOWN: 1,
    Ending.OTHER_STREAM: 1.5,
    Ending.BAD_INPUT: 2,
}


@dataclass
class SoakContext:
    """State that all clients share."""

    url: str
    oracle: Oracle
    utterances: Sequence[Utterance]
    idle_s: float
    """The server's idle limit."""
    api_key: str | None = None
    results: Results = field(default_factory=Results)
    begun_s: float = field(default_factory=time.monotonic)
    outages: list[tuple[float, float]] = field(default_factory=list)
    """Start and end of each time in which a stage was down."""

    def lost_a_stage(self, begun: float, ended: float) -> bool:
        return any(begun < end + AFTER_OUTAGE_S and ended > start for start, end in self.outages)


@dataclass(frozen=True)
class SoakSession:
    """One planned session: its utterance, its number of blocks, and how it ends."""

    context: SoakContext
    rng: random.Random
    ending: Ending
    utterance: Utterance
    blocks: int
    frame_options: FrameOptions = field(default_factory=FrameOptions)

    @classmethod
    def random(cls, context: SoakContext, rng: random.Random) -> SoakSession:
        ending = rng.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]
        frame_options = rng.choice(FRAME_OPTIONS) if ending in (Ending.COMPLETED, Ending.CLOSED) else FrameOptions()
        return cls(
            context, rng, ending, rng.choice(context.utterances), rng.randint(1, UTTERANCE_BLOCKS), frame_options
        )

    def check(self, block: Block) -> None:
        """Checks frames of a session that says the utterance."""
        frames = list(block.jpegs) or [frame.tobytes() for frame in block.frames]
        self.compare(block.first_frame, frames, self.utterance.frames)

    def compare(self, first: int, frames: Sequence[bytes], expected: Array) -> None:
        expected = expected[: self.blocks * FRAMES_PER_BLOCK][first : first + len(frames)]
        self.context.results.compare(self.ending, first, frames, self.frame_options.of(expected))

    def speech(self) -> Iterator[Array]:
        """The utterance's blocks at a random pace."""
        waits = self.rng.choice((_at_once, _in_real_time, _slowly, _in_bursts))(self.rng)
        for block in self.utterance.speech[: self.blocks]:
            time.sleep(next(waits))
            yield block

    def client(self, **options: Any) -> AvatarSession:
        utterance = self.utterance
        return AvatarSession(
            self.context.url,
            image=utterance.image,
            prompt=utterance.prompt,
            seed=utterance.seed,
            keep_alive_s=1.0,
            send_timeout_s=ANSWER_S,
            answer_timeout_s=ANSWER_S,
            api_key=self.context.api_key,
            **self.frame_options.options,
            **options,
        )

    def run(self, end: Callable[[SoakSession], None]) -> None:
        """Runs the session with `end`, which speaks and ends it, and counts the outcome."""
        begun = time.monotonic()
        try:
            end(self)
        except Exception as error:  # any error is counted
            why = f"{type(error).__name__}: {error}"
            ran = f"{begun - self.context.begun_s:.1f} to {time.monotonic() - self.context.begun_s:.1f} s"
            self.context.results.ended(self.ending, self._outcome(why, begun), f"{why[:400]} ({ran})")
        else:
            self.context.results.ended(self.ending, Outcome.EXPECTED, "")

    def _outcome(self, why: str, begun: float) -> Outcome:
        if FULL in why:
            return Outcome.FULL
        if any(sign in why for sign in HANGS):
            return Outcome.HUNG
        if self.context.lost_a_stage(begun, time.monotonic()):
            return Outcome.LOST
        drained = self.ending is Ending.DRAINED and SHUTTING_DOWN in why
        return Outcome.SHUT_DOWN if drained else Outcome.UNEXPECTED


def _at_once(rng: random.Random) -> Iterator[float]:
    while True:
        yield 0.0


def _in_real_time(rng: random.Random) -> Iterator[float]:
    while True:
        yield BLOCK_S


def _slowly(rng: random.Random) -> Iterator[float]:
    while True:
        yield rng.uniform(0.3, 1.5)


def _in_bursts(rng: random.Random) -> Iterator[float]:
    while True:
        yield rng.uniform(0.5, 2.5)
        yield from (0.0 for _ in range(rng.randint(1, 5)))
