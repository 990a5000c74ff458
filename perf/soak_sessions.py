"""The sessions of the soak: what each client says, how it ends, and how its frames are checked.

Every frame is compared with the generator's. The frames of the beginning of an utterance come from a pool; the frames
of other speech are generated when they are needed.
"""

from __future__ import annotations

import hashlib
import io
import random
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from PIL import Image, ImageOps
from tritonclient.grpc import service_pb2_grpc

from live_avatar.arrays import Array
from live_avatar.assets import PORTRAIT
from live_avatar.pipeline.generator import Generator
from live_avatar.serving.label import Label
from live_avatar_client import AvatarSession, Block
from live_avatar_client.base import open_channel
from live_avatar_client.errors import AvatarError, SessionFailed, SessionRefused
from live_avatar_client.messages import Opening, Request, Response
from live_avatar_client.pacing import BLOCK_S
from live_avatar_client.protocol import (
    BLOCK_SAMPLES,
    FRAMES_PER_BLOCK,
    MAX_SEQUENCE_ID,
    SEED_PARAMETER,
    EndReason,
    ErrorCode,
    FrameFormat,
    parse_error,
)
from live_avatar_client.wire import Message, decode_response, encode_request

AVATARS = 6
UTTERANCES_PER_AVATAR = 3
UTTERANCE_BLOCKS = 20
ANSWER_S = 30.0
CALL_S = 90.0
AFTER_OUTAGE_S = 2.0
NOTHING = np.zeros(0, dtype=np.int16)
FULL = "sessions of this server are taken"
SHUTTING_DOWN = "shutting down"
HANGS = ("AnswerTimeout", "SendTimeout", "DEADLINE_EXCEEDED")


class Unexpected(Exception):  # noqa: N818 - it is a finding of the soak
    """The server did something else than what this ending asks for."""


# ---- What is said, and what must be seen


@dataclass(frozen=True)
class Utterance:
    """Somebody who says something: int16 [blocks, samples] -> uint8 [frames, H, W, 3]."""

    image: bytes
    prompt: str
    seed: int
    speech: Array
    frames: Array

    def speech_of(self, blocks: int) -> Array:
        return self.speech[:blocks].reshape(-1)


@dataclass(frozen=True)
class FrameOptions:
    """In what form the frames are wanted; a quality of 0 is for raw ones."""

    jpeg_quality: int = 0
    label: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """As the client utterances them."""
        chosen = {"frame_format": FrameFormat.JPEG, "jpeg_quality": self.jpeg_quality} if self.jpeg_quality else {}
        return {**chosen, "label": self.label}

    def of(self, frames: Array) -> list[bytes]:
        """Every frame as the bytes that a client gets for it."""
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
    """Expected frames: of the beginning of an utterance from the pool, of anything else made by `generate` at once."""

    def __init__(self, generate: Callable[[Utterance, Array], Array]) -> None:
        self._generate = generate
        self._lock = threading.Lock()

    def frames(self, utterance: Utterance, heard: Array) -> Array:
        """Of int16 [samples], whole blocks, as the server heard them."""
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
    """The portrait, tinted."""
    grey = Image.open(PORTRAIT).convert("L")
    tints = [(255 - 20 * n, 160 + 15 * n, 130 + 20 * n) for n in range(count)]
    return [_encoded(ImageOps.colorize(grey, "black", tint), "PNG") for tint in tints]


def _jpeg(frame: Array, quality: int) -> bytes:
    return _encoded(Image.fromarray(frame), "JPEG", quality=quality)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- What was seen


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
    OTHER_TOKEN = "other token"
    BAD_INPUT = "bad input"
    DRAINED = "live in the drain"


class Outcome(StrEnum):
    """What its client saw."""

    EXPECTED = "expected"
    FULL = "refused, full"
    LOST = "lost with a stage"
    HUNG = "no answer"
    SHUT_DOWN = "ended by the drain"
    UNEXPECTED = "unexpected"


class Results:
    """Counts of all sessions and frames, from many threads."""

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
        """Frames from number `first` on, with as many of the expected ones; more than there are is wrong as well."""
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


@dataclass
class SoakContext:
    """What all clients share."""

    url: str
    oracle: Oracle
    utterances: Sequence[Utterance]
    idle_s: float
    """After how long a silence the server drops a session."""
    results: Results = field(default_factory=Results)
    begun_s: float = field(default_factory=time.monotonic)
    outages: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of the times in which a stage was down."""

    def lost_a_stage(self, begun: float, ended: float) -> bool:
        return any(begun < end + AFTER_OUTAGE_S and ended > start for start, end in self.outages)


@dataclass(frozen=True)
class SoakSession:
    """One session to be: who says how many blocks of what, and how it ends."""

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
        """Frames of a session that says the utterance's words."""
        frames = list(block.jpegs) or [frame.tobytes() for frame in block.frames]
        self.compare(block.first_frame, frames, self.utterance.frames)

    def compare(self, first: int, frames: Sequence[bytes], expected: Array) -> None:
        expected = expected[: self.blocks * FRAMES_PER_BLOCK][first : first + len(frames)]
        self.context.results.compare(self.ending, first, frames, self.frame_options.of(expected))

    def speech(self) -> Iterator[Array]:
        """The utterance's blocks at a pace of their own."""
        waits = self.rng.choice((_at_once, _in_real_time, _slowly, _in_bursts))(self.rng)
        for block in self.utterance.speech[: self.blocks]:
            time.sleep(next(waits))
            yield block

    def session(self, **options: Any) -> AvatarSession:
        utterance = self.utterance
        return AvatarSession(
            self.context.url,
            image=utterance.image,
            prompt=utterance.prompt,
            seed=utterance.seed,
            keep_alive_s=1.0,
            answer_timeout_s=ANSWER_S,
            **self.frame_options.options,
            **options,
        )

    def run(self) -> None:
        """Does it, and counts what came of it."""
        begun = time.monotonic()
        try:
            ENDINGS[self.ending](self)
        except Exception as error:  # whatever it is, it is counted
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


class RawStream:
    """A client without manners: single requests on a stream of its own, each answered before the next."""

    def __init__(self, visit: SoakSession, session: int | None = None) -> None:
        self.session = session or secrets.randbelow(MAX_SEQUENCE_ID) + 1
        self.said = 0
        self._visit = visit
        self._token = secrets.token_hex(16)
        self._channel = open_channel(visit.context.url)
        self._messages: list[Message] = []
        self._given = threading.Semaphore(0)
        self._over = False
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._call = stub.ModelStreamInfer(self._requests(), timeout=CALL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the session in whatever state it is, unless the call is cancelled."""
        with suppress(AvatarError, grpc.RpcError):
            if not self._over:
                self.ask(self.request(NOTHING, end=EndReason.FAILED if kind else EndReason.COMPLETED))
        self.cancel()

    def request(self, audio: Array, *, start: bool = False, end: EndReason | None = None) -> Message:
        utterance = self._visit.utterance
        opening = Opening(utterance.image, utterance.prompt, utterance.seed, FrameFormat.RAW) if start else None
        return encode_request(Request(self.session, self._token, audio, opening, end))

    def start(self) -> None:
        self.ask(self.request(NOTHING, start=True))

    def say(self, blocks: int) -> None:
        """Says the next blocks of the utterance, and checks what comes."""
        for _ in range(blocks):
            answer = self.ask(self.request(self._visit.utterance.speech[self.said]))
            self.said += 1
            self._visit.compare(
                answer.first_frame, [frame.tobytes() for frame in answer.frames], self._visit.utterance.frames
            )

    def ask(self, message: Message) -> Response:
        """Raises `SessionRefused` or `SessionFailed` for an error."""
        self._send(message)
        answer = next(self._call)
        if not answer.error_message:
            return decode_response(answer.infer_response)
        code, sentence = parse_error(answer.error_message)
        raise (SessionRefused if FULL in sentence else SessionFailed)(sentence, code)

    def refused(self, message: Message, *codes: ErrorCode | None) -> None:
        """Asks for something that the server must refuse with one of the codes; None is Triton's own refusal."""
        try:
            self.ask(message)
        except SessionFailed as error:
            if error.code not in codes:
                raise
        else:
            raise Unexpected("the server answered what it should have refused")

    def cancel(self) -> None:
        self._over = True
        self._given.release()
        self._call.cancel()
        self._channel.close()

    def send_and_cancel(self) -> None:
        """Leaves with a block on its way."""
        self._send(self.request(self._visit.utterance.speech[self.said]))
        self.cancel()

    def _send(self, message: Message) -> None:
        self._messages.append(message)
        self._given.release()

    def _requests(self) -> Iterator[Message]:
        while True:
            self._given.acquire()
            if self._over and not self._messages:
                return
            yield self._messages.pop(0)


# ---- Endings


def completed(visit: SoakSession) -> None:
    frames = 0
    with visit.session() as session:
        for block in session.stream(visit.speech()):
            visit.check(block)
            frames += len(block)
    if frames != visit.blocks * FRAMES_PER_BLOCK:
        raise Unexpected(f"{frames} frames came for {visit.blocks} blocks")


def closed(visit: SoakSession) -> None:
    wanted = visit.rng.randint(0, visit.blocks - 1)
    with visit.session() as session:
        for _, block in zip(range(wanted), session.stream(visit.speech()), strict=False):
            visit.check(block)


def interrupted(visit: SoakSession) -> None:
    """Says a part and half a block, which is dropped; goes on with what follows in the utterance."""
    before = visit.rng.randint(1, visit.blocks)
    said = visit.utterance.speech_of(visit.blocks)
    cut = before * BLOCK_SAMPLES
    with visit.session() as session:
        session.send(np.concatenate([said[:cut], said[: BLOCK_SAMPLES // 2]]))
        session.interrupt()
        session.send(said[cut:])
        session.end()
        frames = 0
        for block in session:
            visit.check(block)
            frames += len(block)
            if block.stale != (block.first_frame < before * FRAMES_PER_BLOCK):
                raise Unexpected(f"stale is {block.stale} of frame {block.first_frame}, interrupted at block {before}")
    if frames != visit.blocks * FRAMES_PER_BLOCK:
        raise Unexpected(f"{frames} frames came for {visit.blocks} blocks, interrupted at block {before}")


def idle(visit: SoakSession) -> None:
    """Short, as its frames have to be made for it: nobody knows beforehand when there will be silence."""
    spoken = visit.utterance.speech_of(min(visit.blocks, 3))
    with visit.session(idle=True) as session:
        time.sleep(visit.rng.uniform(0.0, 1.5))
        session.send(spoken)
        time.sleep(visit.rng.uniform(0.0, 1.5))
        session.send(spoken[:BLOCK_SAMPLES])
        session.end()
        blocks = list(session)
    heard = np.concatenate([block.audio for block in blocks])
    expected = visit.context.oracle.frames(visit.utterance, heard)
    visit = replace(visit, blocks=len(heard) // BLOCK_SAMPLES)
    for block in blocks:
        visit.compare(block.first_frame, [frame.tobytes() for frame in block.frames], expected)


def cancelled(visit: SoakSession) -> None:
    with RawStream(visit) as stream:
        stream.start()
        stream.say(visit.rng.randint(0, visit.blocks - 1))
        stream.send_and_cancel()


CLIENT = """
import hashlib, io, sys
import numpy as np
from live_avatar_client import AvatarSession
from live_avatar_client.errors import AvatarError
given = np.load(io.BytesIO(sys.stdin.buffer.read()))
try:
    url, prompt, seed = sys.argv[1:]
    with AvatarSession(url, image=given["image"].tobytes(), prompt=prompt, seed=int(seed)) as session:
        for block in session.stream([given["speech"]]):
            print(block.first_frame, *(hashlib.sha256(frame).hexdigest() for frame in block.frames), flush=True)
except AvatarError as error:
    print(type(error).__name__, error, flush=True)
"""


def killed(visit: SoakSession) -> None:
    """A client in a process of its own gets SIGKILL."""
    utterance, given = visit.utterance, io.BytesIO()
    np.savez(given, image=np.frombuffer(utterance.image, dtype=np.uint8), speech=utterance.speech_of(visit.blocks))
    command = [sys.executable, "-c", CLIENT, visit.context.url, utterance.prompt, str(utterance.seed)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            client.stdin.write(given.getvalue())
            client.stdin.close()
            for _ in range(visit.rng.randint(1, visit.blocks)):
                first, *rest = client.stdout.readline().decode().split(maxsplit=1) or ["nothing"]
                if not first.isdecimal():
                    words = " ".join([first, *rest])
                    raise (SessionRefused if FULL in words else SessionFailed)(words)
                _compare_hashes(visit, int(first), rest[0].split())
        finally:
            client.kill()


def _compare_hashes(visit: SoakSession, first: int, hashes: Sequence[str]) -> None:
    frames = visit.utterance.frames[first : first + len(hashes)]
    expected = [hashlib.sha256(frame.tobytes()).hexdigest().encode() for frame in frames]
    visit.context.results.compare(visit.ending, first, [word.encode() for word in hashes], expected)


def silent(visit: SoakSession) -> None:
    with RawStream(visit) as stream:
        stream.start()
        stream.say(visit.blocks - 1)
        time.sleep(visit.context.idle_s + 2.0)
        stream.refused(stream.request(visit.utterance.speech[stream.said]), None, ErrorCode.FAILED_PRECONDITION)


def started_twice(visit: SoakSession) -> None:
    """The second START is refused, on the stream of the first or on another; the session goes on."""
    with RawStream(visit) as stream:
        stream.start()
        before = visit.rng.randint(0, visit.blocks)
        stream.say(before)
        if visit.rng.random() < 0.5:
            stream.refused(stream.request(NOTHING, start=True), ErrorCode.INVALID_ARGUMENT)
        else:
            _intrude(visit, stream.session, start=True)
        stream.say(visit.blocks - before)


def unknown(visit: SoakSession) -> None:
    with RawStream(visit) as stream:
        stream.refused(stream.request(visit.utterance.speech[0]), None, ErrorCode.FAILED_PRECONDITION)


def other_token(visit: SoakSession) -> None:
    with RawStream(visit) as stream:
        stream.start()
        before = visit.rng.randint(0, visit.blocks)
        stream.say(before)
        _intrude(visit, stream.session)
        stream.say(visit.blocks - before)


def _intrude(visit: SoakSession, session: int, *, start: bool = False) -> None:
    """Another connection uses the id, without END: that is refused as well, but Triton ends the sequence."""
    intruder = RawStream(visit, session)
    try:
        audio = NOTHING if start else visit.utterance.speech[0]
        intruder.refused(intruder.request(audio, start=start), ErrorCode.INVALID_ARGUMENT)
    finally:
        intruder.cancel()


def bad_input(visit: SoakSession) -> None:
    """Something that START refuses, or a block of a wrong length, after which the session goes on."""
    with RawStream(visit) as stream:
        message = stream.request(NOTHING, start=True)
        match visit.rng.choice(("picture", "seed", "prompt", "block")):
            case "picture":
                bad = encode_request(
                    Request(stream.session, "t", NOTHING, Opening(b"no picture", "", 0, FrameFormat.RAW), None)
                )
                stream.refused(bad, ErrorCode.INVALID_ARGUMENT)
            case "seed":
                message.parameters[SEED_PARAMETER].string_param = "seven"
                stream.refused(message, ErrorCode.INVALID_ARGUMENT)
            case "prompt":
                message.raw_input_contents[-1] = b"\x02\x00\x00\x00\xff\xfe"
                stream.refused(message, ErrorCode.INVALID_ARGUMENT)
            case _:
                stream.ask(message)
                stream.refused(stream.request(visit.utterance.speech[0][:-1]), ErrorCode.INVALID_ARGUMENT)
                stream.say(visit.blocks)


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
    Ending.OTHER_TOKEN: 1.5,
    Ending.BAD_INPUT: 2,
}
ENDINGS: dict[Ending, Callable[[SoakSession], None]] = {
    Ending.COMPLETED: completed,
    Ending.CLOSED: closed,
    Ending.INTERRUPTED: interrupted,
    Ending.IDLE: idle,
    Ending.CANCELLED: cancelled,
    Ending.KILLED: killed,
    Ending.SILENT: silent,
    Ending.STARTED_TWICE: started_twice,
    Ending.UNKNOWN: unknown,
    Ending.OTHER_TOKEN: other_token,
    Ending.BAD_INPUT: bad_input,
    Ending.DRAINED: completed,
}
